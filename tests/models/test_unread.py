"""Models that come without weights, of which each process reads its slice: each has what it would
have of a whole model. The processes here are made up; real ones are in
tests/end_to_end/test_sharded.py.

Run: python -m pytest tests/models/test_unread.py
"""

import pytest
import torch
import torch.distributed as dist
from helpers.families import LORA, TOKENIZER, exact, save
from helpers.made_up_processes import assert_slices, process
from helpers.tiny import FAMILIES, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf.config import InputError, ModelConfig
from rlhf.models import (
    ScalarModel,
    add_lora,
    init_reward_model,
    load_policy,
    load_reward_model,
    shard,
)
from rlhf.models.unread import adds_products, read_weights, unread

TASKS = "CAUSAL_LM", "SEQ_CLS"


@pytest.fixture(autouse=True)
def sharding(monkeypatch):
    monkeypatch.setattr("rlhf.models.load.loads_in_slices", lambda: True)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_reads_its_slice_of_every_weight(family, tmp_path):
    config = save(tmp_path / "m", tiny_model(family, TOKENIZER, vocab_size=300))  # gets 20 rows
    for rank in (0, 1):
        with process(rank):
            policy = load_policy(config, TOKENIZER, in_slices=True)
            assert unread(policy) and all(p.is_meta for p in policy.parameters())
            shard(policy)
            assert_slices(policy, load_policy(config, TOKENIZER), rank)
            reward = ScalarModel(init_reward_model(config, TOKENIZER, 0, in_slices=True))
            shard(reward)
            assert_slices(reward, ScalarModel(init_reward_model(config, TOKENIZER, 0)), rank)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_lora_too_with_the_adapters_of_one_process(family, tmp_path):
    config = save(tmp_path / "m", tiny_model(family, TOKENIZER))
    for rank, kind in ((1, torch.float32), (0, torch.bfloat16)):
        config.dtype = str(kind).removeprefix("torch.")
        whole = [load_policy(config, TOKENIZER), init_reward_model(config, TOKENIZER, 0)]
        whole = [add_lora(m, LORA, t, 3) for m, t in zip(whole, TASKS, strict=True)]
        with process(rank):
            policy = load_policy(config, TOKENIZER, in_slices=True)
            reward = init_reward_model(config, TOKENIZER, 0, in_slices=True)
            for model, task, other in zip((policy, reward), TASKS, whole, strict=True):
                adapted = add_lora(model, LORA, task, 3)
                assert unread(adapted)
                shard(adapted)
                assert_slices(adapted, other, rank)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_adapters_train_start_at_those_of_the_files(tied, tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER, tie_word_embeddings=tied))
    expected = add_lora(load_policy(config, TOKENIZER), LORA, "CAUSAL_LM", 3, [5, 9])
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = load_policy(config, TOKENIZER, in_slices=True)
        model = add_lora(model, LORA, "CAUSAL_LM", 3, [5, 9])
        shard(model)
        assert_slices(model, expected, 0, world=1)
    finally:
        dist.destroy_process_group()


def save_adapters(path, base, number, **settings):
    """Adapters on one another, each in a directory of its own, the last in `path`."""
    for step in range(number):
        model = load_policy(ModelConfig(path=str(base)), TOKENIZER)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, **settings))
        generator = torch.Generator().manual_seed(step)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        base = path if step == number - 1 else path.with_name(f"{path.name}-{step}")
        adapted.save_pretrained(base)
        TOKENIZER.save_pretrained(base)
    return ModelConfig(path=str(path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_adapters_add_is_in_the_slices_as_in_a_merged_model(family, tmp_path):
    base = save(tmp_path / "m", tiny_model(family, TOKENIZER)).path
    linear = {"target_modules": "all-linear", "use_rslora": True}
    config = save_adapters(tmp_path / "adapter", base, 2, **linear)
    for rank, kind in ((0, "bfloat16"), (1, "float32")):
        config.dtype = kind
        with process(rank):
            policy = load_policy(config, TOKENIZER, in_slices=True)
            assert unread(policy) and all(p.is_meta for p in policy.parameters())
            shard(policy)
            assert_slices(policy, load_policy(config, TOKENIZER), rank)
            reward = init_reward_model(config, TOKENIZER, 0, in_slices=True)
            assert unread(reward)
            shard(reward)
            assert_slices(reward, init_reward_model(config, TOKENIZER, 0), rank)
            under = add_lora(load_policy(config, TOKENIZER, in_slices=True), LORA, TASKS[0], 3)
            shard(under)
            assert_slices(under, add_lora(load_policy(config, TOKENIZER), LORA, TASKS[0], 3), rank)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_adapters_that_add_more_are_merged_into_whole_models(settings, tmp_path, capsys):
    base = save(tmp_path / "m", tiny_model("llama", TOKENIZER)).path
    config = save_adapters(tmp_path / "adapter", base, 1, **settings)
    capsys.readouterr()
    policy = load_policy(config, TOKENIZER, in_slices=True)
    assert unread(policy) is None
    assert f"python -m rlhf.export path={config.path} out=" in capsys.readouterr().out


def test_an_adapter_with_biases_adds_more_than_products(tmp_path):
    base = save(tmp_path / "m", tiny_model("gpt_neox", TOKENIZER)).path
    save_adapters(tmp_path / "plain", base, 1, target_modules=["dense_h_to_4h"])
    biased = {"lora_bias": True, "init_lora_weights": False}
    save_adapters(tmp_path / "biased", base, 1, target_modules=["dense_h_to_4h"], **biased)
    assert adds_products(tmp_path / "plain") and not adds_products(tmp_path / "biased")


def new(family, **values):
    """Settings of a new model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_type, own = FAMILIES[family]
    return ModelConfig(config={"model_type": model_type, **sizes, **own, **values})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_draws_its_slice_of_a_new_model(family):
    for rank, tied in ((0, family != "gptj"), (1, False)):  # tied, GPT-J is made whole: below
        config = new(family, tie_word_embeddings=tied)
        torch.manual_seed(3)
        whole, after = load_policy(config, TOKENIZER), torch.rand(3)
        torch.manual_seed(3)
        with process(rank):
            policy = load_policy(config, TOKENIZER, in_slices=True)
            exact(torch.rand(3), after)
            assert unread(policy) and all(p.is_meta for p in policy.parameters() if p.dim() > 1)
            shard(policy)
            assert_slices(policy, whole, rank)


@pytest.mark.parametrize(
    ("family", "values", "why"),
    [
        ("llama", {"vocab_size": 300}, "its tables get further rows"),
        ("gptj", {"tie_word_embeddings": True}, "its weights are not drawn one by one"),
    ],
)
def test_another_new_model_is_made_whole(family, values, why, capsys):
    config = new(family, **values)
    torch.manual_seed(3)
    expected, after = load_policy(config, TOKENIZER), torch.rand(3)
    torch.manual_seed(3)
    policy = load_policy(config, TOKENIZER, in_slices=True)
    exact(torch.rand(3), after)
    assert unread(policy) is None
    exact(dict(policy.state_dict()), dict(expected.state_dict()))
    said = capsys.readouterr().out
    assert f"model.config: each process makes the whole model, because {why}" in said


@pytest.mark.parametrize("world", [3, 40])
def test_the_last_processes_hold_fewer_rows_or_none(world, tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER))
    whole = ScalarModel(init_reward_model(config, TOKENIZER, 0))
    for rank in (0, world - 1):
        with process(rank, world):
            reward = ScalarModel(init_reward_model(config, TOKENIZER, 0, in_slices=True))
            shard(reward)
            assert_slices(reward, whole, rank, world)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_slices_have_the_type_of_training_and_heads_are_float32(dtype, tmp_path):
    model = init_reward_model(save(tmp_path / "sft", tiny_model("llama", TOKENIZER)), TOKENIZER, 0)
    config = save(tmp_path / "m", model.to(torch.bfloat16), "reward")
    config.dtype = dtype
    with process(1):
        reward = load_reward_model(config, in_slices=True)
        shard(reward)
        assert_slices(reward, load_reward_model(config), 1)


def test_tied_tables_stay_one_table(tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER, tie_word_embeddings=True))
    with process(1):
        policy = load_policy(config, TOKENIZER, in_slices=True)
        shard(policy)
        assert_slices(policy, load_policy(config, TOKENIZER), 1)
        assert policy.lm_head.weight is policy.get_input_embeddings().weight


def changed(directory, **tensors):
    """Change the weights of a model in a directory; None removes one."""
    file = directory / "model.safetensors"
    content = load_file(file) | tensors
    save_file({k: v for k, v in content.items() if v is not None}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "there are no weights for model.norm.weight"),
        ({"model.extra": torch.ones(2)}, "the model has no place for model.extra"),
        ({"model.norm.weight": torch.ones(3)}, "other shapes: model.norm.weight"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight holds nan"),
    ],
)
def test_bad_weights_are_refused_as_those_of_a_whole_model(tensors, message, tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER))
    changed(tmp_path / "m", **tensors)
    errors = []
    for in_slices in (False, True):
        with process(0), pytest.raises(InputError, match=message) as caught:
            shard(load_policy(config, TOKENIZER, in_slices=in_slices))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_files_with_other_tensors_than_the_model_are_read_whole(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=320, **sizes, **heads))
    config = save(tmp_path / "m", model)  # experts one by one
    policy = load_policy(config, TOKENIZER, in_slices=True)
    assert unread(policy) is None
    assert (
        "each process reads the whole model, because its files hold no" in capsys.readouterr().out
    )
    with process(1):
        shard(policy)
        assert_slices(policy, load_policy(config, TOKENIZER), 1)


def test_weights_without_the_prefix_of_the_model_are_read_in_slices(tmp_path):
    config = save(tmp_path / "m", tiny_model("gpt2", TOKENIZER))
    content = load_file(tmp_path / "m" / "model.safetensors")
    content = {name.removeprefix("transformer."): value for name, value in content.items()}
    save_file(content, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with process(1):
        policy = load_policy(config, TOKENIZER, in_slices=True)
        assert unread(policy)
        shard(policy)
        assert_slices(policy, load_policy(config, TOKENIZER), 1)


def test_a_checkpoint_is_read_into_slices(tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER, tie_word_embeddings=True))
    other = tiny_model("llama", TOKENIZER, seed=1, tie_word_embeddings=True)
    other.save_pretrained(tmp_path / "checkpoint")
    with process(1):
        policy = load_policy(config, TOKENIZER, in_slices=True)
        shard(policy)
        read_weights(policy, tmp_path / "checkpoint")
        assert_slices(policy, other, 1)
        changed(tmp_path / "checkpoint", **{"model.norm.weight": None})
        with pytest.raises(InputError, match="there are no weights for model.norm.weight"):
            read_weights(policy, tmp_path / "checkpoint")
