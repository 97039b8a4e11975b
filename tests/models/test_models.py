"""rlhf.models: loading, refusals, tokenizers, precision, adapters; tiny models of two families.

The contract of every family is in test_families.py.
Run: pytest tests/models/test_models.py
"""

from __future__ import annotations

import functools
import json
import math
import types

import pytest
import torch
from helpers.families import (
    EOS,
    LORA,
    PAD,
    SEQUENCES,
    TOKENIZER,
    VOCAB,
    close,
    exact,
    logits_of,
    positions_before_last,
    save,
    scores_of,
    train_policy,
    train_scores,
)
from helpers.tiny import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.config import InputError, ModelConfig, ScorerConfig
from rlhf.models import (
    Reading,
    add_lora,
    freeze,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    merged,
    parameter_count,
    position_ids_from_mask,
    resize_embeddings,
    response_logprobs,
    sequence_scores,
)
from rlhf.scorers import RewardModelScorer, score_sequences
from rlhf.tokenizer import forbidden_token_ids, load_tokenizer, num_tokens

both_families = pytest.mark.parametrize("family", ["llama", "gpt_neox"])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def saved_policy(tmp_path_factory):
    """family -> ModelConfig of a saved policy; each is written once."""

    @functools.cache
    def config(family):
        return save(tmp_path_factory.mktemp(family) / "final", tiny_model(family, TOKENIZER))

    return config


@pytest.fixture(scope="module")
def saved_reward_model(tmp_path_factory, saved_policy):
    """family -> ModelConfig of a saved reward model, with the head as it was initialised."""

    @functools.cache
    def config(family):
        model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
        directory = tmp_path_factory.mktemp(family) / "reward"
        return save(directory, model, "reward", score_mean=0.5, score_std=2.0)

    return config


# --- Padding ------------------------------------------------------------------------------------


def test_positions_count_valid_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]).bool()
    exact(position_ids_from_mask(mask), torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 2, 3]]))


@both_families
def test_sequence_scores_read_the_last_valid_token_not_the_last_that_is_not_pad(family):
    class Positions(nn.Module):
        def forward(self, ids, mask):
            return torch.arange(ids.shape[1]).float().expand(ids.shape)

    ids = torch.tensor([[PAD, 5, 6, PAD, PAD], [5, 6, PAD, PAD, 9]])
    mask = torch.tensor([[False, True, True, True, False], [True, True, True, False, False]])
    exact(sequence_scores(Positions(), ids, mask), torch.tensor([3.0, 2.0]))


# --- Saving and loading -------------------------------------------------------------------------


@both_families
def test_saved_tokenizer_loads_by_path(family, saved_policy):
    tokenizer = load_tokenizer(saved_policy(family))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)


@both_families
def test_saved_reward_model_loads_with_identical_scores(family, tmp_path, saved_policy):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    train_scores(model)
    config = save(tmp_path / "reward", model, "reward", score_mean=0.5, score_std=2.0)
    raw = scores_of(model)
    exact(scores_of(load_reward_model(config)), raw)
    for normalize, expected in (
        ("none", raw),
        ("demo_mean_zero", raw - 0.5),
        ("standardise", (raw - 0.5) / 2.0),
    ):
        scorer = RewardModelScorer(ScorerConfig(path=config.path, normalize=normalize))
        close(score_sequences(scorer.model, SEQUENCES, 2), expected)


@both_families
def test_head_is_drawn_from_its_seed_with_variance_one_over_d_plus_one(family, tmp_path):
    wide = tiny_model(family, TOKENIZER, hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    config = save(tmp_path / "wide", wide)
    torch.manual_seed(1)
    head = init_reward_model(config, TOKENIZER, seed=3).score
    torch.manual_seed(2)
    again = init_reward_model(config, TOKENIZER, seed=3).score
    other = init_reward_model(config, TOKENIZER, seed=4).score
    assert head.weight.shape == (1, 1024) and head.weight.dtype == torch.float32
    assert head.bias is None and head.weight.requires_grad
    exact(head.weight, again.weight)
    assert not (head.weight == other.weight).any()
    # Four standard errors of a mean and of a standard deviation over 1024 draws.
    standard = head.weight * math.sqrt(1025)
    assert abs(standard.mean()) < 4 / math.sqrt(1024)
    assert abs(standard.std() - 1) < 4 / math.sqrt(2 * 1024)


@both_families
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bfloat16_load_keeps_the_head_exactly(family, dtype, tmp_path, saved_policy):
    half = ModelConfig(path=saved_policy(family).path, dtype="bfloat16")
    model = init_reward_model(half, TOKENIZER, seed=3)
    assert model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    path = save(tmp_path / "reward", model, "reward").path
    loaded = load_reward_model(ModelConfig(path=path, dtype=dtype))
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    exact(loaded.score.weight, model.score.weight)
    assert (model.score.weight != model.score.weight.bfloat16().float()).any()
    exact(scores_of(loaded), scores_of(model))
    assert scores_of(loaded).dtype == torch.float32


@both_families
def test_bfloat16_load_of_a_float32_reward_model_keeps_the_head(family, saved_reward_model):
    path = saved_reward_model(family).path
    loaded = load_reward_model(ModelConfig(path=path, dtype="bfloat16"))
    exact(loaded.score.weight, load_file(f"{path}/model.safetensors")["score.weight"])
    assert loaded.base_model.dtype == torch.bfloat16


# --- Refusals -----------------------------------------------------------------------------------


@both_families
def test_missing_head_weights_are_an_error_never_a_fresh_head(family, saved_policy):
    with pytest.raises(InputError, match=r"scorer\.path=.*score\.weight.*not a reward model"):
        load_reward_model(saved_policy(family))


def test_head_missing_from_a_reward_directory_is_an_error(tmp_path, saved_policy):
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    config = save(tmp_path / "reward", model, "reward")
    file = tmp_path / "reward/model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="score.weight"):
        load_reward_model(config)


def test_head_with_two_labels_is_an_error(tmp_path, saved_policy):
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    model.score = nn.Linear(32, 2, bias=False)
    with pytest.raises(
        InputError, match=r"scorer\.path=.*score\.weight.*not a reward model with one label"
    ):
        load_reward_model(save(tmp_path / "two", model, "reward"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused(tmp_path, name):
    model = tiny_model("llama", TOKENIZER)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / name)
    config = ModelConfig(path=str(tmp_path))
    for load in (load_policy, load_reference):
        with pytest.raises(InputError, match=rf"model\.path=.*pickled.*{name}.*safetensors"):
            load(config, TOKENIZER)
    with pytest.raises(InputError, match=name):
        load_reward_model(config)


def test_training_arguments_beside_safetensors_are_not_refused(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    config = save(tmp_path / "final", model)
    (tmp_path / "final/training_args.bin").write_bytes(b"")
    exact(logits_of(load_policy(config, TOKENIZER)), logits_of(model))


@pytest.mark.parametrize("name", ["nowhere", "runs/none/sft/final"])
def test_a_missing_directory_is_named(tmp_path, name):
    config = ModelConfig(path=str(tmp_path / name))
    for load in (
        lambda: load_policy(config, TOKENIZER),
        lambda: load_tokenizer(config),
        lambda: init_reward_model(config, TOKENIZER, seed=0),
    ):
        with pytest.raises(InputError, match=rf"model\.path={config.path}: no such directory"):
            load()
    with pytest.raises(InputError, match=rf"scorer\.path={config.path}: no such directory"):
        load_reward_model(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model.config has no model_type"),
        ({"model_type": "llamma"}, "model_type=llamma is not known. Did you mean llama"),
        ({"model_type": "llama", "hiden_size": 32}, "hiden_size is not a setting .* hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "model.config: "),
    ],
)
def test_a_model_config_that_cannot_be_built_is_an_input_error(values, message):
    with pytest.raises(InputError, match=message):
        load_policy(ModelConfig(config=values), TOKENIZER)


def test_a_model_is_built_for_the_tokenizer_it_gets():
    values = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    model = load_policy(ModelConfig(config=values), TOKENIZER)
    assert model.config.vocab_size == VOCAB
    for holder in (model.config, model.generation_config):
        assert (holder.pad_token_id, holder.eos_token_id) == (PAD, EOS)


# --- Tokenizer and embedding tables --------------------------------------------------------------


def saved_tokenizer(directory, **special):
    tokenizer = tiny_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    return ModelConfig(path=str(directory))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no EOS token; set it in"):
        load_tokenizer(saved_tokenizer(tmp_path, eos_token=None))


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_eos_pads_if_there_is_no_pad_token_of_its_own(tmp_path, pad_token):
    tokenizer = load_tokenizer(saved_tokenizer(tmp_path, pad_token=pad_token))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS and len(tokenizer) == VOCAB


def test_a_pad_token_of_its_own_is_kept(tmp_path):
    assert load_tokenizer(saved_tokenizer(tmp_path)).pad_token_id == PAD


def test_policy_table_grows_for_an_added_token(tmp_path):
    model = tiny_model("gpt_neox", TOKENIZER)
    config = save(tmp_path / "final", model, tokenizer=tiny_tokenizer())
    config.special_tokens, config.pad_token = ["<|pad|>"], "<|pad|>"
    tokenizer = load_tokenizer(config)
    grown = load_policy(config, tokenizer)
    assert grown.config.vocab_size == VOCAB + 1 and grown.config.pad_token_id == VOCAB
    exact(logits_of(grown)[..., :VOCAB], logits_of(model))
    assert forbidden_token_ids(tokenizer, VOCAB + 1).tolist() == [VOCAB]


@both_families
def test_a_larger_table_is_left_alone(family):
    model = tiny_model(family, TOKENIZER, vocab_size=VOCAB + 64)
    before = logits_of(model)
    resize_embeddings(model, VOCAB)
    exact(logits_of(model), before)
    assert before.shape[-1] == VOCAB + 64


def test_surplus_rows_of_a_padded_table_are_forbidden():
    forbidden = forbidden_token_ids(TOKENIZER, VOCAB + 4)
    assert forbidden.tolist() == [PAD, VOCAB, VOCAB + 1, VOCAB + 2, VOCAB + 3]
    assert forbidden.dtype == torch.long


def test_eos_is_never_forbidden_even_when_it_is_the_pad_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert forbidden_token_ids(tokenizer, VOCAB).tolist() == []
    assert EOS not in forbidden_token_ids(TOKENIZER, VOCAB).tolist()


# --- LoRA ---------------------------------------------------------------------------------------


def test_adapters_are_drawn_from_their_seed(saved_policy):
    def adapters(seed):
        torch.manual_seed(99)
        model = add_lora(load_policy(saved_policy("llama"), TOKENIZER), LORA, "CAUSAL_LM", seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    exact(adapters(1), adapters(1))
    assert not torch.equal(adapters(1), adapters(2))


def test_adapters_alone_train_and_of_a_classifier_the_head_too(saved_policy):
    policy = add_lora(load_policy(saved_policy("llama"), TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    every, trained = parameter_count(policy)
    assert (
        every
        > trained
        == sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name)
    )
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    model = add_lora(model, LORA, "SEQ_CLS", seed=0)
    rest = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert [name.split(".")[-4:-2] for name in rest] == [["score", "modules_to_save"]]


@both_families
def test_merging_in_bfloat16_rounds_neither_head_nor_rotary_frequencies(family, saved_policy):
    half = ModelConfig(path=saved_policy(family).path, dtype="bfloat16")
    live = add_lora(init_reward_model(half, TOKENIZER, seed=3), LORA, "SEQ_CLS", seed=0)
    head = live.get_base_model().score.weight.detach().clone()
    plain = merged(live)
    assert plain.get_input_embeddings().weight.dtype == torch.bfloat16
    exact(plain.score.weight, head)
    exact(dict(plain.named_buffers()), dict(live.get_base_model().named_buffers()))
    exact(scores_of(plain), scores_of(live))  # fresh adapters change nothing


def test_merged_returns_a_plain_model_itself():
    model = tiny_model("llama", TOKENIZER)
    assert merged(model) is model


@both_families
def test_an_adapter_directory_loads_as_the_merged_model(family, tmp_path, saved_policy):
    base = load_policy(saved_policy(family), TOKENIZER)
    live = add_lora(base, LORA, "CAUSAL_LM", seed=0)
    train_policy(live)
    live.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == saved_policy(family).path
    config = ModelConfig(path=str(tmp_path / "adapter"))
    for loaded in (load_policy(config, TOKENIZER), load_reference(config, TOKENIZER)):
        close(logits_of(loaded), logits_of(live), atol=1e-5)
        assert not any("lora" in name for name, _ in loaded.named_parameters())


# --- Gradient checkpointing ---------------------------------------------------------------------


@both_families
def test_loaders_enable_gradient_checkpointing_when_asked(family, saved_policy, saved_reward_model):
    def config(source):
        return ModelConfig(path=source(family).path, gradient_checkpointing=True)

    assert load_policy(config(saved_policy), TOKENIZER).is_gradient_checkpointing
    assert init_reward_model(config(saved_policy), TOKENIZER, seed=0).is_gradient_checkpointing
    assert load_reward_model(config(saved_reward_model)).is_gradient_checkpointing
    assert not load_policy(saved_policy(family), TOKENIZER).is_gradient_checkpointing


# --- Reference ----------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("patched", [False, True])
def test_reference_does_not_follow_the_policy(family, patched, saved_policy):
    policy = load_policy(saved_policy(family), TOKENIZER)
    if patched:  # as a trainer does that wraps the loss head: `forward` on the instance
        original = policy.forward
        policy.forward = types.MethodType(lambda self, *a, **kw: original(*a, **kw), policy)
    reference = load_reference(saved_policy(family), TOKENIZER)
    assert not any(p.requires_grad for p in reference.parameters())
    shared = {p.data_ptr() for p in policy.parameters()}
    assert not shared & {p.data_ptr() for p in reference.parameters()}
    before = logits_of(reference)
    exact(logits_of(policy), before)
    train_policy(policy)
    assert (logits_of(policy) - before).abs().max() > 0.1
    exact(logits_of(reference), before)


def test_freeze_stops_gradients_and_dropout():
    model = tiny_model("gpt_neox", TOKENIZER, attention_dropout=0.5, hidden_dropout=0.5)
    model = freeze(model.train())
    assert not any(p.requires_grad for p in model.parameters())
    exact(logits_of(model), logits_of(model))


def test_a_policy_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)


@pytest.mark.parametrize("num_response", [1, 3, 12])
def test_a_frozen_copy_gives_bit_identical_log_probs(num_response):
    """torch multiplies a slice by a frozen weight otherwise than by one that trains."""
    policy = tiny_model("llama", TOKENIZER, hidden_size=128, intermediate_size=256)
    ids = torch.randint(3, 300, (64, 20), generator=torch.Generator().manual_seed(0))
    mask, positions = (
        torch.ones_like(ids, dtype=torch.bool),
        positions_before_last(ids, num_response),
    )
    tokens, wanted = ids[:, -num_response:], mask[:, -num_response:]
    logprobs = []
    for trains in (True, False):
        policy.requires_grad_(trains)
        with torch.no_grad():
            reading = Reading(ids, mask, positions, tokens, wanted, torch.tensor([0]))
            logprobs.append(response_logprobs(policy, reading)[0])
    assert torch.equal(*logprobs) and (logprobs[0] != 0).all()


def test_ids_are_counted_up_to_the_largest_where_some_are_left_out():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "<eos>": 7}  # four tokens, but ids up to 7
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    assert num_tokens(tokenizer) == 8
    assert forbidden_token_ids(tokenizer, 10).tolist() == [0, 8, 9]  # EOS stays possible
