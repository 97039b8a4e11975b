"""Models in 8 and 4 bits (bitsandbytes runs on a CPU too): layers, adapters, merging, the stages.

Run: pytest tests/models/test_quantization.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys

import pytest
import torch
from helpers.checkpoints import take_back_end
from helpers.families import (
    LORA,
    PAD,
    SEQUENCES,
    TOKENIZER,
    VOCAB,
    close,
    exact,
    logits_of,
    padded,
    save,
    scores_of,
    train_policy,
)
from helpers.tiny import tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")
from bitsandbytes import functional  # noqa: E402

from rlhf import train_ppo, train_reward, train_sft  # noqa: E402
from rlhf.config import (  # noqa: E402
    CheckpointConfig,
    CriticConfig,
    DatasetConfig,
    EvaluationConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    check,
)
from rlhf.export import load_checkpoint  # noqa: E402
from rlhf.metrics import read_jsonl  # noqa: E402
from rlhf.models import (  # noqa: E402
    ScalarModel,
    add_lora,
    init_reward_model,
    load_policy,
    load_reward_model,
    merged,
    parameter_count,
    resize_embeddings,
    sequence_scores,
)
from rlhf.models.quantization import dequantized_weight, is_quantized, require_support  # noqa: E402

both_widths = pytest.mark.parametrize("quantization", ["8bit", "4bit"])
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(family, quantization) -> ModelConfig; each family is written once."""

    @functools.cache
    def config(family):
        model = tiny_model(family, TOKENIZER, **WIDE)
        return save(tmp_path_factory.mktemp(family) / "final", model)

    return lambda family, quantization: dataclasses.replace(
        config(family), quantization=quantization
    )


def quantized_layers(model):
    return {name for name, module in model.named_modules() if is_quantized(module)}


# --- Layers -------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "gpt2", "gemma3"])
def test_the_layers_of_the_blocks_are_quantised_and_nothing_else(family, quantization, saved):
    config = saved(family, quantization)
    plain = load_policy(saved(family, None), TOKENIZER)
    policy = load_policy(config, TOKENIZER)
    matrices = {
        name.removesuffix(".weight")
        for name, p in plain.named_parameters()
        if p.dim() == 2 and re.search(r"\.\d\.", name)
    }
    assert quantized_layers(policy) == matrices
    assert parameter_count(policy)[0] == parameter_count(plain)[0]
    reward_model = init_reward_model(config, TOKENIZER, seed=0)
    assert quantized_layers(reward_model) == matrices
    for head in (policy.get_output_embeddings(), reward_model.score):
        assert type(head) is nn.Linear and head.weight.dtype == torch.float32
    live = add_lora(policy, LORA, "CAUSAL_LM", seed=0)
    adapted = {name for name, m in live.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == matrices


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_8bit_weights_are_near_those_of_the_checkpoint(family, saved):
    """Within half a step of absmax / 127 of each row."""
    plain = load_policy(saved(family, None), TOKENIZER)
    policy = load_policy(saved(family, "8bit"), TOKENIZER)
    for name in quantized_layers(policy):
        expected = plain.get_submodule(name).weight
        if family == "gpt2":
            expected = expected.T  # stored as (inputs, outputs)
        step = expected.abs().amax(dim=1, keepdim=True) / 127
        error = (dequantized_weight(policy.get_submodule(name)) - expected).abs()
        assert (error <= 0.51 * step + 1e-3).all()  # the weights pass through float16


@both_widths
def test_embeddings_of_a_quantised_model_grow(quantization, saved):
    policy = load_policy(saved("llama", quantization), TOKENIZER)
    layers, logits = quantized_layers(policy), logits_of(policy)
    resize_embeddings(policy, VOCAB + 3)
    exact(logits_of(policy)[..., :VOCAB], logits)
    for table in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        close(table.weight[VOCAB:], table.weight[:VOCAB].mean(dim=0).expand(3, -1))
    assert quantized_layers(policy) == layers


def test_4bit_passes_are_the_same_in_training_and_in_evaluation(saved):
    """bitsandbytes packs the weights anew for evaluation on some CPUs and rounds their scales."""
    policy = load_policy(saved("llama", "4bit"), TOKENIZER)
    layer = policy.get_submodule("model.layers.0.mlp.up_proj")
    weight = dequantized_weight(layer)
    logits = [logits_of(policy.train(mode)) for mode in (True, False, True)]
    exact(logits[1], logits[0])
    exact(logits[2], logits[0])
    exact(dequantized_weight(layer), weight)


# --- Adapters -----------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_merged_is_dequantised_plus_delta_and_not_quantised(family, quantization, saved, tmp_path):
    config = saved(family, quantization)
    live = add_lora(load_policy(config, TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    base = logits_of(live)
    train_policy(live)
    trained = logits_of(live)
    assert (trained - base).abs().max() > 0.1
    plain = merged(live)
    exact(logits_of(live), trained)  # the live model is left alone
    with live.disable_adapter():
        exact(logits_of(live), base)  # only adapters have been trained
    for name, module in live.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
        if quantization == "4bit":
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = layer.weight.data.float() * layer.state.SCB[:, None] / 127
        expected = weight + LORA.alpha / LORA.r * (b.weight @ a.weight)
        actual = plain.get_submodule(name).weight
        close(actual, expected.T if family == "gpt2" else expected, atol=1e-6)
    final = save(tmp_path / "final", plain)
    assert "quantization" not in (tmp_path / "final/config.json").read_text()
    loaded = load_policy(final, TOKENIZER)
    assert not quantized_layers(loaded) and loaded.dtype == torch.float32
    exact(logits_of(loaded), logits_of(plain.eval()))
    # LLM.int8 rounds the activations too, which final/ does not
    close(logits_of(loaded), trained, atol=1e-4 if quantization == "4bit" else 1.0)


@both_widths
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_merged_weights_have_the_dtype_of_the_model(quantization, dtype, saved, tmp_path):
    half = load_policy(dataclasses.replace(saved("gpt_neox", None), dtype="bfloat16"), TOKENIZER)
    config = dataclasses.replace(
        save(tmp_path / "half", half), quantization=quantization, dtype=dtype
    )
    live = add_lora(load_policy(config, TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    train_policy(live, num_steps=1)
    plain = merged(live)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert logits_of(plain).isfinite().all()


@both_widths
def test_checkpointing_gives_the_same_gradients(quantization, saved):
    gradients = []
    for checkpointing in (False, True):
        config = saved("llama", quantization)
        config = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        live = add_lora(load_policy(config, TOKENIZER), LORA, "CAUSAL_LM", seed=0).train()
        ids = torch.tensor([SEQUENCES[0]])
        live(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in live.named_parameters() if p.requires_grad})
    assert all("lora_" in name for name in gradients[0])
    assert any(gradient.abs().max() > 0.01 for gradient in gradients[0].values())
    close(gradients[1], gradients[0])


@both_widths
def test_scores_do_not_depend_on_padding(quantization, saved, tmp_path):
    model = ScalarModel(init_reward_model(saved("llama", quantization), TOKENIZER, seed=3)).eval()
    scores = [sequence_scores(model, *padded([s], "right")) for s in SEQUENCES]
    with torch.no_grad():
        for fill in (PAD, 77):
            batch = sequence_scores(model, *padded(SEQUENCES, "right", fill))
            # which inputs LLM.int8 treats apart depends on the whole batch
            atol = 1e-5 if quantization == "4bit" else 0.1
            close(batch, torch.cat(scores), atol=atol)


# --- The stages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved):
    """A folder with rows for the three stages."""
    directory = tmp_path_factory.mktemp("runs")
    facts = [(f"Name fruit {i}.", f" Apple {i}.", f" No {i}.") for i in range(24)]
    files = {
        "sft": [{"prompt": p, "completion": good} for p, good, _ in facts],
        "reward": [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in facts],
        "ppo": [{"prompt": p} for p, _, _ in facts],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


def settings(folder, quantization, stage, model):
    trains = {"enabled": True, "r": 8, "alpha": 16}
    formats = {"sft": "prompt_completion", "reward": "pair", "ppo": "prompt_completion"}
    return {
        "runs_dir": str(folder),
        "run_name": quantization,
        "model": model,
        "dataset": DatasetConfig(
            path=str(folder / f"{stage}.jsonl"),
            format=formats[stage],
            eval_fraction=0.2,
            max_length=64,
        ),
        "peft": PeftConfig(**trains),
        "checkpoint": CheckpointConfig(every=8),
    }


def weights_after_resuming(train, config, final):
    """Weights of `final/` when the steps after the last checkpoint are taken again."""
    take_back_end(final.parent)
    train(dataclasses.replace(config, resume=True))
    return load_file(final / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_all_stages_train_adapters_on_a_quantised_base(quantization, folder, saved):
    base = saved("llama", quantization)
    sft = SFTStageConfig(**settings(folder, quantization, "sft", base), num_samples=0)
    sft.trainer |= {"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 4}
    directory = train_sft(sft).directory
    losses = [
        row["loss"] for row in read_jsonl(directory.parent / "metrics.jsonl") if "loss" in row
    ]
    assert losses[-1] < 0.5 * losses[0]
    before, after = (load_file(f"{path}/model.safetensors") for path in (base.path, directory))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = quantized_layers(load_policy(base, TOKENIZER))
    assert changed == {f"{name}.weight" for name in layers}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    resumed = weights_after_resuming(train_sft, sft, directory)
    exact(resumed, after)
    halfway, *_ = load_checkpoint(directory.parent / "checkpoint-8")
    assert not quantized_layers(halfway)
    adapters = load_file(directory.parent / "checkpoint-8/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}

    own = dataclasses.replace(base, path=None)
    reward = RewardStageConfig(**settings(folder, quantization, "reward", own))
    reward.trainer |= {"max_steps": 12, "learning_rate": 3e-3, "logging_steps": 4}
    result = train_reward(reward)
    assert result.after["eval_accuracy"] == 1.0
    expected = load_file(result.directory / "model.safetensors")
    exact(weights_after_resuming(train_reward, reward, result.directory), expected)
    reward_model = load_reward_model(
        dataclasses.replace(base, path=str(folder / quantization / "reward/final"))
    )
    assert quantized_layers(reward_model) == layers and scores_of(reward_model).isfinite().all()

    ppo = PPOStageConfig(
        **settings(folder, quantization, "ppo", own),
        ppo=PPOConfig(num_updates=2, batch_size=8, response_length=8, learning_rate=1e-3),
        critic=CriticConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every=2, num_prompts=4),
        preflight=False,
    )
    directory = train_ppo(ppo).directory
    rows = read_jsonl(directory.parent / "metrics.jsonl")
    first = next(row for row in rows if "first_ratio_deviation" in row)
    assert first["kl"] == 0.0  # the reference is the policy with its adapters off
    assert first["first_ratio_deviation"] < (1e-5 if quantization == "4bit" else 0.1)
    for stage in ("sft", "reward", "ppo"):
        config = json.loads((folder / quantization / stage / "final/config.json").read_text())
        assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(directory)


# --- Refusals -----------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("family", ["falcon_7b", "falcon_40b"])
def test_layers_that_transformers_does_not_quantise_are_refused(family, quantization, saved):
    with pytest.raises(InputError, match=f"model.quantization={quantization}: .*FalconLinear"):
        load_policy(saved(family, quantization), TOKENIZER)


def test_a_model_that_is_stored_in_4_bits_is_not_trained_as_a_whole(folder, saved, tmp_path):
    load_policy(saved("llama", "4bit"), TOKENIZER).save_pretrained(tmp_path / "stored")
    TOKENIZER.save_pretrained(tmp_path / "stored")
    for train, kind, stage in (
        (train_sft, SFTStageConfig, "sft"),
        (train_reward, RewardStageConfig, "reward"),
    ):
        values = settings(folder, "4bit", stage, ModelConfig(path=str(tmp_path / "stored")))
        config = kind(**values | {"peft": PeftConfig(), "run_name": "whole"})
        with pytest.raises(InputError, match="stored is stored in 8 or 4 bits, .*set peft=lora"):
            train(config)
        assert not config.stage_dir(stage).exists()


def test_an_adapter_directory_is_refused_with_the_way_to_merge_it(saved, tmp_path):
    live = add_lora(load_policy(saved("llama", None), TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    live.save_pretrained(tmp_path)
    config = dataclasses.replace(saved("llama", "4bit"), path=str(tmp_path))
    with pytest.raises(InputError, match="holds an adapter, .*python -m rlhf.export path="):
        load_policy(config, TOKENIZER)


@both_widths
def test_a_device_without_bitsandbytes_is_refused_with_its_reason(quantization):
    with pytest.raises(InputError, match=f"model.quantization={quantization}: .* on meta .*Error"):
        require_support(quantization, torch.device("meta"), torch.float32)


def test_8bit_on_a_cpu_refuses_float16_which_it_overwrites():
    for dtype in (torch.float32, torch.bfloat16):
        require_support("8bit", torch.device("cpu"), dtype)
    with pytest.raises(InputError, match="torch.float16 .* on cpu .*inplace.*another model.dtype"):
        require_support("8bit", torch.device("cpu"), torch.float16)


def test_without_bitsandbytes_the_extra_is_named(saved, folder, monkeypatch):
    config = SFTStageConfig(**settings(folder, "4bit", "sft", saved("llama", "4bit")))
    check(config)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match=re.escape("not installed: pip install 'rlhf[quant]'")):
        check(config)
