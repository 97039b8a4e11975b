"""What holds for some model families only is measured on the model when a stage starts: packing,
the sampler's cache, padding, targets of adapters.

Run: pytest tests/models/test_equivalence.py
"""

import json
import math

import pytest
import torch
from helpers import tiny
from helpers.families import TOKENIZER
from helpers.tiny import FAMILIES, tiny_model
from helpers.tiny_ppo import make_config, words_scorer, write_policy
from torch import nn
from transformers import LlamaModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import rlhf.sft.stage
from rlhf import train_ppo, train_reward, train_sft
from rlhf.chat import Chat, ChatOptions
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    RewardStageConfig,
    ScorerConfig,
    SFTStageConfig,
)
from rlhf.equivalence import (
    choose_forward,
    require_cache,
    require_packing,
    require_padding,
    tolerance,
)
from rlhf.metrics import read_jsonl
from rlhf.models import ScalarModel, add_lora, enable_padding_free, init_reward_model
from rlhf.scorers import load_scorer

SEE_EACH_OTHER = ["opt", "falcon_7b", "falcon_40b", "bloom", "mamba"]
OTHERS = {  # families with a state, and those that tiny.py leaves out
    "mamba": ("mamba", {"state_size": 8}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 128}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"attention_window_size": 8, "num_key_value_heads": 1, "num_hidden_layers": 3},
    ),
    "lfm2": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    ),
}
PRECISIONS = ["float32", "bfloat16", "autocast"]


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    for name, family in OTHERS.items():
        monkeypatch.setitem(tiny.FAMILIES, name, family)


def collator(padding_free=True, **values):
    return DataCollatorForLanguageModeling(TOKENIZER.pad_token_id, padding_free, **values)


def require_packed(model, longest=0, **values):
    require_packing(model, TOKENIZER, collator(**values), "trainer.packing=true", longest, "fix")


def reads_padding(monkeypatch):
    """Llama adds the mean over all positions, those under the mask too."""
    forward = LlamaModel.forward

    def with_mean(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + hidden.mean(dim=1, keepdim=True)
        return output

    monkeypatch.setattr(LlamaModel, "forward", with_mean)


def write(directory, family):
    tiny_model(family, TOKENIZER).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return str(directory)


# --- No false alarm -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_family_that_keeps_the_promises_is_refused(family, precision, tmp_path):
    model = tiny_model(family, TOKENIZER)
    scalar = ScalarModel(init_reward_model(ModelConfig(write(tmp_path, family)), TOKENIZER, 0))
    if precision == "bfloat16":
        model, scalar.model = model.bfloat16(), scalar.model.bfloat16()
        scalar.model.score.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert tolerance(model) < (1e-3 if precision == "float32" else 0.1)
        require_cache(model, TOKENIZER, "model.path=x", "fix")
        require_cache(model, TOKENIZER, "path=x", "fix", num_rows=1)
        require_padding(model, TOKENIZER, "model.path=x", "fix")
        require_padding(scalar, TOKENIZER, "scorer.path=x", "fix")
        if family not in SEE_EACH_OTHER:
            require_packed(model)
            require_packed(model, pad_to_multiple_of=32)
            require_packed(model, longest=1000)


def test_a_model_that_predicts_nothing_is_not_refused():
    model = tiny_model("llama", TOKENIZER)
    nn.init.zeros_(model.lm_head.weight)
    require_cache(model, TOKENIZER, "model.path=x", "fix")
    require_padding(model, TOKENIZER, "model.path=x", "fix")
    require_packed(model)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_models_are_not_refused(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    from rlhf.models import load_policy

    config = ModelConfig(write(tmp_path, "llama"), quantization=quantization)
    model = load_policy(config, TOKENIZER)
    require_cache(model, TOKENIZER, "model.path=x", "fix")
    require_padding(model, TOKENIZER, "model.path=x", "fix")
    require_packed(model)


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEE_EACH_OTHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_refused_where_rows_see_each_other(family, dtype):
    model = tiny_model(family, TOKENIZER).to(dtype)
    what = r"^trainer.packing=true: \w+ \(\w+\) cannot be used for this, as rows in one sequence "
    with pytest.raises(InputError, match=what + r"see each other \(its .*rounding.*\); fix$"):
        require_packed(model)


def test_packing_is_refused_where_long_sequences_fail():
    model = tiny_model("gpt_neo", TOKENIZER)
    require_packed(model, longest=128)
    with pytest.raises(InputError, match=r"\(gpt_neo\) cannot .*fails with RuntimeError: .* fix$"):
        require_packed(model, longest=129)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "recurrent_gemma", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_the_loop_does_not_sample_from_is_refused(family, dtype):
    model = tiny_model(family, TOKENIZER).to(dtype)
    with pytest.raises(InputError, match=rf"^model.path=x: \w+ \({family}\) cannot .*; fix$"):
        require_cache(model, TOKENIZER, "model.path=x", "fix")


@pytest.mark.parametrize("scalar", [False, True])
def test_a_model_that_reads_padding_is_refused(scalar, tmp_path, monkeypatch):
    model = tiny_model("llama", TOKENIZER)
    if scalar:
        model = ScalarModel(init_reward_model(ModelConfig(write(tmp_path, "llama")), TOKENIZER, 0))
    reads_padding(monkeypatch)
    with pytest.raises(InputError, match="x: Llama.* as it reads the padding of a batch"):
        require_padding(model, TOKENIZER, "x", "fix")


@pytest.mark.parametrize("require", [require_cache, require_padding, require_packed])
def test_a_model_whose_numbers_are_nan_is_refused(require):
    model = tiny_model("llama", TOKENIZER)
    nn.init.constant_(model.model.norm.weight, math.nan)
    named = () if require is require_packed else (TOKENIZER, "x", "fix")
    with pytest.raises(InputError, match=r"Llama.* \(its numbers change by nan"):
        require(model, *named)


def test_a_model_whose_numbers_or_gradients_are_nan_is_padded():
    model = tiny_model("llama", TOKENIZER)
    smallest = min(model.parameters(), key=torch.numel)
    hook = smallest.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(InputError, match="because its gradients change by nan"):
        choose_forward(model, TOKENIZER, "padding_free")
    hook.remove()
    assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(InputError, match="see each other .its numbers change by nan"):
        choose_forward(model, TOKENIZER, "padding_free")


@pytest.mark.parametrize("family", ["mamba", "bloom"])
@pytest.mark.parametrize("wrong", [None, ["no_such_layer"]])
def test_adapters_go_on_any_family_or_its_layers_are_listed(family, wrong):
    model = tiny_model(family, TOKENIZER)
    config = PeftConfig(enabled=True, target_modules=wrong)
    if wrong is None and family == "bloom":
        assert add_lora(model, config, "CAUSAL_LM", 0).peft_config
        return
    with pytest.raises(InputError, match="^peft.target_modules=.*(in_proj|query_key_value)"):
        add_lora(model, config, "CAUSAL_LM", 0)


def test_a_model_without_linear_layers_gets_no_adapters():
    model = tiny_model("llama", TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn = layer.mlp = nn.Identity()
    with pytest.raises(InputError, match="peft.target_modules=null: .* or train in full"):
        add_lora(model, PeftConfig(enabled=True), "CAUSAL_LM", 0)


# --- The stages -----------------------------------------------------------------------------------


def sft_config(folder, family, **trainer):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}?", "completion": " {i}."}}\n' for i in range(12)))
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(write(folder / family, family)),
        dataset=DatasetConfig(str(rows), format="prompt_completion", max_length=40),
        num_samples=2,
        response_length=4,
    )
    config.dataset.eval_fraction = 0.3
    config.trainer |= {"max_steps": 2, "logging_steps": 1} | trainer
    return config


def test_sft_refuses_before_anything_is_written(tmp_path):
    for family, trainer, message in (
        ("falcon_7b", {"packing": True}, "^trainer.packing=true: Falcon.*trainer.packing=false$"),
        ("falcon_7b", {"padding_free": True}, "^trainer.padding_free=true: Falcon.*padding_free=f"),
        (
            "llama",
            {"packing": True, "packing_strategy": "wrapped"},
            "^trainer.packing=true: Llama.*, or trainer.packing_strategy=bfd$",
        ),
        ("mamba", {}, "^num_samples=2: Mamba.*; set num_samples=0, or take"),
    ):
        with pytest.raises(InputError, match=message):
            train_sft(sft_config(tmp_path, family, **trainer))
    assert not (tmp_path / "runs").exists()
    config = sft_config(tmp_path, "mamba")
    config.num_samples = 0
    assert train_sft(config).directory is not None


def test_the_collator_that_is_tried_is_that_of_the_trainer(tmp_path, monkeypatch):
    tried, used = [], []
    monkeypatch.setattr(rlhf.sft.stage, "require_packing", lambda *a: tried.append(a[2]))
    monkeypatch.setattr(
        rlhf.sft.stage, "run_trainer", lambda trainer, *a: used.append(trainer.data_collator) or 1
    )
    for values in (
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
    ):
        values.pop("max_length", None)
        config = sft_config(tmp_path, "llama", **values)
        config.overwrite = True
        try:
            train_sft(config)
        except ValueError as error:  # TRL wants packing with a maximum length
            assert "padding_free" in str(error)
            used.append(tried[-1])
    assert tried == used and [c.padding_free for c in tried] == [True, False, True]


def test_ppo_and_chat_refuse_a_family_that_is_not_sampled_right(tmp_path):
    path = write(tmp_path / "mamba", "mamba")
    config = make_config(write_policy(tmp_path / "policy"), tmp_path)
    config.model.path = path
    config.ppo.advantage = "rloo"
    config.ppo.samples_per_prompt = 2
    with pytest.raises(InputError, match=f"^model.path={path}: MambaForCausalLM .*another family"):
        train_ppo(config)
    with pytest.raises(InputError, match=f"^path={path}: MambaForCausalLM .*another family"):
        Chat(ChatOptions(path=path))


def test_reward_stage_scorer_and_critic_refuse_a_model_that_reads_padding(tmp_path, monkeypatch):
    path = write(tmp_path / "llama", "llama")
    rows = tmp_path / "ranked.jsonl"
    row = {"prompt": "A fruit?", "responses": [" An apple.", " A car."], "ranks": [0, 1]}
    rows.write_text("".join(json.dumps(row | {"prompt": f"{i}?"}) + "\n" for i in range(12)))
    dataset = DatasetConfig(str(rows), format="ranked", max_length=60, eval_fraction=0.3)
    config = RewardStageConfig(
        runs_dir=str(tmp_path / "runs"), model=ModelConfig(path), dataset=dataset
    )
    config.trainer |= {"max_steps": 1}
    config.run_name = "before"
    scorer = str(train_reward(config).directory)
    reads_padding(monkeypatch)
    config.run_name = "after"
    with pytest.raises(InputError, match=f"^model.path={path}: LlamaForSequenceClassification"):
        train_reward(config)
    with pytest.raises(InputError, match=f"^scorer.path={scorer}: LlamaForSequenceClass"):
        load_scorer(ScorerConfig(scorer, normalize="none"), "cpu")
    assert not (tmp_path / "runs/after").exists()


def test_a_text_model_that_reads_padding_is_no_scorer(tmp_path):
    from transformers import FNetConfig, FNetForSequenceClassification

    values = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 32}
    torch.manual_seed(0)
    config = FNetConfig(**values, num_hidden_layers=2, num_labels=1, max_position_embeddings=64)
    FNetForSequenceClassification(config).save_pretrained(tmp_path / "fnet")
    TOKENIZER.save_pretrained(tmp_path / "fnet")
    with pytest.raises(InputError, match="scorer.path=.*FNet.* reads the padding of a batch"):
        load_scorer(ScorerConfig(str(tmp_path / "fnet"), normalize="none"), "cpu")


# --- Nothing changes ------------------------------------------------------------------------------


def padding_free(model):
    """What is found for this family, without measuring."""
    enable_padding_free(model)
    return "padding-free"


def all_padding_free(actors):
    for model in (actors.policy, actors.reference, actors.critic.model):
        padding_free(model)
    return "padding-free"


def test_training_is_the_same_with_and_without_measuring(tmp_path, monkeypatch):
    rows = []
    for name in ("measured", "not"):
        if name == "not":
            monkeypatch.setattr(rlhf.sft.stage, "require_promises", lambda *a: padding_free(a[2]))
            monkeypatch.setattr("rlhf.ppo.stage.check_promises", lambda *a: all_padding_free(a[1]))
        (tmp_path / name).mkdir()
        config = sft_config(tmp_path / name, "llama", packing=True)
        config.model.dropout = 0.1
        sft = train_sft(config).directory.parent
        ppo = train_ppo(
            make_config(write_policy(tmp_path / name / "policy"), tmp_path / name, num_updates=2),
            words_scorer,
        ).directory.parent
        rows.append([read_jsonl(stage / "metrics.jsonl") for stage in (sft, ppo)])
    assert rows[0] == rows[1]


def test_a_model_and_the_random_numbers_are_left_as_they_were(monkeypatch):
    model, forward = (
        tiny_model("llama", TOKENIZER, attention_dropout=0.5).train(),
        nn.Linear.forward,
    )

    def drawing(self, hidden):
        torch.rand(1)  # some models draw in evaluation mode too
        return forward(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", drawing)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    require_cache(model, TOKENIZER, "x", "fix")
    require_padding(model, TOKENIZER, "x", "fix")
    require_packed(model)
    assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
