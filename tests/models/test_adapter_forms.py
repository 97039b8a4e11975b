"""Adapters that are more than LoRA on linear layers: on the experts of a mixture, with weights that
PEFT derives or shares, or of kinds that cannot be merged.

Run: python -m pytest tests/models/test_adapter_forms.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.families import LORA, TOKENIZER, VOCAB, close, logits_of, save, train_policy
from helpers.tiny import tiny_model
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import InputError, ModelConfig
from rlhf.models import add_lora, load_policy, merged


def experts(family):
    """A tiny mixture of experts, whose experts are one tensor for each projection."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"num_local_experts" if family == "mixtral" else "num_experts": 4}
    config = AutoConfig.for_model(
        family, **sizes, **own, num_experts_per_tok=2, initializer_range=0.3
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_adapters_on_experts_are_merged(family, tmp_path):
    base = experts(family)
    before = logits_of(base)
    live = add_lora(base, LORA, "CAUSAL_LM", seed=0)
    train_policy(live)
    for name, parameter in live.named_parameters():
        if ".experts." in name and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    logits = logits_of(live)
    assert (logits - before).abs().max() > 0.1
    close(logits_of(merged(live).eval()), logits, atol=1e-4)
    loaded = load_policy(save(tmp_path / "final", merged(live)), TOKENIZER)
    close(logits_of(loaded), logits, atol=1e-4)
    with live.disable_adapter():
        close(logits_of(live), before)


def stored(tmp_path, settings, **model):
    """Write a trained adapter on a tiny Llama, and return the live model and its ModelConfig."""
    base = save(tmp_path / "base", tiny_model("llama", TOKENIZER, **model))
    live = get_peft_model(load_policy(base, TOKENIZER), settings)
    live.peft_config["default"].base_model_name_or_path = base.path
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    live.eval().save_pretrained(tmp_path / "adapter")
    return live, ModelConfig(path=str(tmp_path / "adapter"))


TARGETS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (
            LoraConfig(target_modules=TARGETS, trainable_token_indices=[40, 41]),
            {"tie_word_embeddings": True},
        ),
        (AdaLoraConfig(target_modules=TARGETS, total_step=10), {}),
        (VeraConfig(target_modules=TARGETS), {}),
    ],
    ids=["rows of tied tables", "AdaLoRA", "VeRA"],
)
def test_weights_that_peft_does_not_store_are_not_missed(settings, model, tmp_path):
    live, path = stored(tmp_path, settings, **model)
    close(logits_of(load_policy(path, TOKENIZER)), logits_of(live), atol=1e-4)
    assert (logits_of(live) - logits_of(tiny_model("llama", TOKENIZER, **model))).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"alora_invocation_tokens": [40, 41]}], ids=str
)
def test_an_adapter_that_peft_cannot_merge_is_refused(settings, tmp_path):
    _, path = stored(
        tmp_path, LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    )
    with pytest.raises(InputError, match=r"model\.path=.*adapter.* cannot be merged .*merg.*"):
        load_policy(path, TOKENIZER)
