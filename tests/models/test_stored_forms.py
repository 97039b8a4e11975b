"""Every form in which people keep a model loads as what it is: adapters of every kind, adapters on
adapters, heads with a bias, encoders; from a directory or from the Hub's cache.

Run: python -m pytest tests/models/test_stored_forms.py
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil

import pytest
import torch
from helpers.families import LORA, SEQUENCES, TOKENIZER, close, exact, logits_of, save, scores_of
from helpers.stored import adapted, as_hub_id, classifier, policy, write
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, write_policy
from peft import IA3Config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from rlhf import train_ppo
from rlhf.chat import ChatOptions, talk
from rlhf.checkpoint import require_stage
from rlhf.config import CriticConfig, InputError, ModelConfig, ScorerConfig
from rlhf.export import ExportOptions, export
from rlhf.hub import find_source
from rlhf.models import (
    add_lora,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    merged,
    parameter_count,
)
from rlhf.scorers import RewardModelScorer, score_responses
from rlhf.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("hub_cache")
PROMPTS, RESPONSES = ["Name a fruit.", "Fruit?"], ["An apple.", "A car is no fruit at all."]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    return write(tmp_path_factory.mktemp("base"), tiny_model("llama", TOKENIZER))


# --- Policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"kind": IA3Config, "feedforward_modules": ["down_proj"],
         "target_modules": ["k_proj", "down_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 7]},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_is_merged_and_all_of_the_model_can_be_trained(settings, base, tmp_path):
    live = adapted(policy(base), **settings)
    path = write(tmp_path / "adapter", live, base)
    model = policy(path)
    total, trainable = parameter_count(model)
    assert total == trainable == parameter_count(policy(base))[0]
    assert (logits_of(live) - logits_of(policy(base))).abs().max() > 0.1
    close(logits_of(model), logits_of(live), atol=1e-4)
    exact(logits_of(load_reference(ModelConfig(path=str(path)), TOKENIZER)), logits_of(model))
    model.save_pretrained(tmp_path / "plain")
    exact(logits_of(policy(tmp_path / "plain")), logits_of(model))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_tables_leaves_the_other(module, tmp_path):
    tied = tiny_model("llama", TOKENIZER, tie_word_embeddings=True)
    base = write(tmp_path / "base", tied)
    live = adapted(policy(base), target_modules=["q_proj"], modules_to_save=[module])
    path = write(tmp_path / "adapter", live, base)
    close(logits_of(policy(path)), logits_of(live), atol=1e-4)
    policy(path).save_pretrained(tmp_path / "plain")
    close(logits_of(policy(tmp_path / "plain")), logits_of(live), atol=1e-4)


def test_an_adapter_with_more_tokens_than_its_base_brings_their_rows(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    model = policy(base)
    model.resize_token_embeddings(len(tokenizer))
    live = adapted(model, modules_to_save=["embed_tokens", "lm_head"])
    path = write(tmp_path / "adapter", live, base)
    tokenizer.save_pretrained(path)
    loaded = load_policy(ModelConfig(path=str(path)), load_tokenizer(ModelConfig(path=str(path))))
    ids = [5, len(TOKENIZER), 9]
    close(logits_of(loaded, ids), logits_of(live, ids), atol=1e-4)


def test_an_adapter_on_an_adapter_is_merged_onto_it(base, tmp_path):
    first = adapted(policy(base))
    write(tmp_path / "first", first, base)
    second = adapted(merged(first), target_modules=["o_proj", "up_proj"])
    path = write(tmp_path / "second", second, tmp_path / "first")
    close(logits_of(policy(path)), logits_of(second), atol=1e-4)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(base, tmp_path):
    path = write(tmp_path / "adapter", adapted(policy(base)), base)
    assert not list(path.glob("tokenizer*"))
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_the_forms_of_older_libraries_is_no_misfit(family, tmp_path):
    """Buffers that transformers no longer keeps are in most older files."""
    from safetensors.torch import save_file

    old = {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "mistral": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
        "gpt_neox": [
            f"gpt_neox.layers.0.attention.{name}"
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ],
        "gptj": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
        "falcon_7b": ["transformer.h.0.self_attention.maybe_rotary.inv_freq"],
    }
    path = write(tmp_path / "model", tiny_model(family, TOKENIZER))
    tensors = load_file(path / "model.safetensors")
    tensors |= {name: torch.zeros(3) for name in old.get(family, [])}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    close(logits_of(policy(path)), logits_of(tiny_model(family, TOKENIZER)))
    init_reward_model(ModelConfig(path=str(path)), TOKENIZER, seed=0)


def test_a_pad_token_beyond_the_table_is_replaced(base, tmp_path):
    path = shutil.copytree(base, tmp_path / "model")
    settings = json.loads((path / "config.json").read_text())
    settings["pad_token_id"] = settings["vocab_size"]
    (path / "config.json").write_text(json.dumps(settings))
    exact(logits_of(policy(path)), logits_of(policy(base)))
    assert policy(path).config.pad_token_id == TOKENIZER.pad_token_id
    init_reward_model(ModelConfig(path=str(path)), TOKENIZER, seed=0)


# --- Reward models ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_starts_from_an_adapter_as_from_the_merged_model(family, tmp_path):
    base = write(tmp_path / "base", tiny_model(family, TOKENIZER))
    live = adapted(policy(base), target_modules="all-linear")
    adapter = write(tmp_path / "adapter", live, base)
    plain = write(tmp_path / "plain", merged(live))
    ours, theirs = (
        init_reward_model(ModelConfig(path=str(path)), TOKENIZER, seed=3)
        for path in (adapter, plain)
    )
    close(scores_of(ours), scores_of(theirs), atol=1e-4)
    assert parameter_count(ours) == parameter_count(theirs)
    assert len(set(parameter_count(ours))) == 1
    ours.save_pretrained(tmp_path / "saved")
    loaded = load_reward_model(ModelConfig(path=str(tmp_path / "saved")))
    exact(scores_of(loaded), scores_of(ours))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["language model", "reward model"])
def test_a_classifier_adapter_brings_its_head_in_float32(kind, dtype, base, tmp_path):
    if kind == "reward model":
        base = write(tmp_path / "base", classifier())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    live = adapted(model, task_type="SEQ_CLS", modules_to_save=["score"])
    path = write(tmp_path / "adapter", live, base)
    loaded = load_reward_model(ModelConfig(path=str(path), dtype=dtype))
    exact(loaded.score.weight, live.get_base_model().score.modules_to_save["default"].weight)
    assert loaded.base_model.dtype == getattr(torch, dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.5
    assert (scores_of(loaded) - scores_of(live)).abs().max() < tolerance
    assert len(set(parameter_count(loaded))) == 1


def with_bias(model):
    model.score = nn.Linear(32, 1)
    nn.init.constant_(model.score.bias, 5.0)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_head_with_a_bias_scores_with_it(is_adapter, dtype, tmp_path):
    base = write(tmp_path / "base", classifier())
    model = with_bias(classifier())
    if is_adapter:
        model = adapted(model, task_type="SEQ_CLS", modules_to_save=["score"])
    path = write(tmp_path / "biased", model, base if is_adapter else None)
    loaded = load_reward_model(ModelConfig(path=str(path), dtype=dtype))
    head = model.get_base_model().score.modules_to_save["default"] if is_adapter else model.score
    exact(loaded.score.bias, head.bias)
    exact(loaded.score.weight, head.weight)
    if dtype == "float32":
        with torch.no_grad():
            theirs = [model(input_ids=torch.tensor([ids])).logits.item() for ids in SEQUENCES]
        close(scores_of(loaded), torch.tensor(theirs), atol=1e-4)


def test_a_biased_head_is_merged_with_its_bias(tmp_path):
    path = write(tmp_path / "biased", with_bias(classifier()))
    live = add_lora(load_reward_model(ModelConfig(path=str(path))), LORA, "SEQ_CLS", seed=0)
    close(scores_of(merged(live)), scores_of(live))


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_an_encoder_scores_a_prompt_and_response_as_its_tokenizer_pairs_them(kind, tmp_path):
    encoder = classifier(kind, type_vocab_size=1 if kind == "roberta" else 2)
    head = encoder.classifier.out_proj if kind == "roberta" else encoder.classifier
    nn.init.normal_(head.weight)
    path = write(tmp_path / "encoder", encoder)
    scorer = RewardModelScorer(ScorerConfig(str(path), "none", batch_size=2))
    with torch.no_grad():
        truth = [
            encoder(**pair(kind, prompt, response)).logits.item()
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    close(scorer(PROMPTS, RESPONSES), torch.tensor(truth), atol=1e-4)
    assert truth[0] != truth[1]
    as_messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    exact(scorer(as_messages, RESPONSES), scorer(PROMPTS, RESPONSES))
    scores = score_responses(scorer, ["Fruit?"] * 2, ["y" * 80, "An apple."], "x")
    assert scores.cut.tolist() == [True, False]
    close(scores.total[1:], scorer(["Fruit?"], ["An apple."]))
    with pytest.raises(InputError, match="a prompt has .* tokens, which leaves no room"):
        scorer(["x" * 80], ["y"])
    with pytest.raises(
        InputError, match="1 of 1 responses, with their prompts, exceed the context"
    ):
        scorer(["Fruit?"], ["y" * 80])
    assert scorer.max_length == (63 if kind == "roberta" else 64)


def pair(kind, prompt, response):
    inputs = TOKENIZER(prompt, response, return_tensors="pt")
    if kind == "roberta":
        inputs.pop("token_type_ids", None)
    return inputs


# --- The Hub ------------------------------------------------------------------------------------


def test_a_hub_id_of_an_adapter_is_the_adapter(base, hub_cache, tmp_path, capsys):
    live = adapted(policy(base))
    name = as_hub_id(write(tmp_path / "adapter", live, base), hub_cache)
    close(logits_of(policy(name)), logits_of(live), atol=1e-4)
    assert find_source(name, "model.path").adapters
    export(ExportOptions(path=name, out=str(tmp_path / "out")))
    close(logits_of(policy(tmp_path / "out")), logits_of(live), atol=1e-4)


def test_a_hub_id_as_the_base_of_an_adapter_is_found(base, hub_cache, tmp_path):
    name = as_hub_id(base, hub_cache)
    live = adapted(policy(base))
    path = write(tmp_path / "adapter", live, base)
    settings = json.loads((path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = name
    (path / "adapter_config.json").write_text(json.dumps(settings))
    close(logits_of(policy(path)), logits_of(live), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_a_hub_id_of_a_reward_model_has_its_head_in_float32(dtype, hub_cache, tmp_path):
    path = write(tmp_path / "reward", classifier())
    name = as_hub_id(path, hub_cache)
    local, hub = (
        load_reward_model(ModelConfig(path=str(source), dtype=dtype)) for source in (path, name)
    )
    exact(hub.score.weight, local.score.weight)
    assert hub.score.weight.dtype == torch.float32
    assert hub.base_model.dtype == local.base_model.dtype
    exact(scores_of(hub), scores_of(local))


def test_a_hub_id_is_talked_to(base, hub_cache, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(base, tmp_path / "model")
    name = as_hub_id(path, hub_cache)
    monkeypatch.setattr("sys.stdin", io.StringIO("Fruit?\n"))
    talk(ChatOptions(path=name, temperature=0, response_length=3))
    assert f"{name}: LlamaForCausalLM" in capsys.readouterr().err


def test_a_hub_id_of_a_stage_directory_has_its_record(hub_cache, tmp_path):
    config = save(tmp_path / "final", classifier(), "reward", score_mean=0.5, score_std=2.0)
    name = as_hub_id(config.path, hub_cache)
    ours, theirs = (
        RewardModelScorer(ScorerConfig(path, "standardise")) for path in (name, str(config.path))
    )
    assert (ours.model.mean, ours.model.std) == (0.5, 2.0)
    exact(ours(PROMPTS, RESPONSES), theirs(PROMPTS, RESPONSES))
    with pytest.raises(InputError, match="written by the reward stage"):
        require_stage(name, ("sft",), "model.path")


def test_a_hub_id_with_pickled_weights_only_is_refused(base, hub_cache, tmp_path):
    path = shutil.copytree(base, tmp_path / "model")
    os.rename(path / "model.safetensors", path / "pytorch_model.bin")
    name = as_hub_id(path, hub_cache)
    with pytest.raises(InputError, match=rf"model\.path={name} .*pickled.*pytorch_model\.bin"):
        policy(name)


# --- In a run -----------------------------------------------------------------------------------


def encoder_run(folder, **values):
    """PPO with an encoder as reward model, one update."""
    write(folder / "encoder", classifier("deberta-v2"))
    config = make_config(write_policy(folder / "policy"), folder, num_updates=1)
    config.scorer = ScorerConfig(str(folder / "encoder"), "none")
    config.evaluation.every = 1
    return dataclasses.replace(config, **values)


def test_ppo_is_scored_by_an_encoder(tmp_path):
    result = train_ppo(encoder_run(tmp_path))
    assert math.isfinite(result.after["eval_score"])


def test_a_critic_cannot_start_from_an_encoder(tmp_path):
    with pytest.raises(InputError, match=r"critic\.init=reward: .*set critic\.init=policy"):
        train_ppo(encoder_run(tmp_path, critic=CriticConfig(init="reward")))
