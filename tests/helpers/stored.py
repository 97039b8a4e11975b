"""Models as people keep them: adapters on a base, classifiers, policies from a directory."""

from __future__ import annotations

import shutil

import torch
from helpers.families import EOS, TOKENIZER
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config import ModelConfig
from rlhf.models import load_policy


def write(directory, model, base=None):
    """Save a model, or an adapter on what lies in `base`, with the tokenizer."""
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory)
    if base is None:
        TOKENIZER.save_pretrained(directory)
    return directory


def as_hub_id(directory, cache, name="someone/model"):
    """Put the files of a directory into the Hub's cache, and return their Hub id."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    return name


def adapted(model, kind=LoraConfig, **settings):
    """An adapter whose effect is large: every number of it is random."""
    settings = {"target_modules": ["q_proj", "v_proj"]} | settings
    model = get_peft_model(model, kind(**settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def classifier(kind="llama", num_labels=1, **values):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": len(TOKENIZER)}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "num_labels": num_labels}
    config = AutoConfig.for_model(kind, **sizes | ids | values)
    return AutoModelForSequenceClassification.from_config(config).eval()


def policy(path, **values):
    return load_policy(ModelConfig(path=str(path), **values), TOKENIZER)
