"""Models built from a configuration: a new one with random weights, and a skeleton without weights.

The skeleton shows whether settings fit a model before its weights load. Some models have none, for
example if their own code needs real numbers; their settings are tried on the loaded model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from rlhf.config import InputError, ModelConfig, PeftConfig, nearest
from rlhf.console import say
from rlhf.gguf_files import is_gguf
from rlhf.hub import call_loader, config_directory, find_source
from rlhf.models.adapters import add_lora
from rlhf.models.dropout import set_dropout
from rlhf.models.random_weights import new_in_slices
from rlhf.tokenizer import num_tokens


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, in_slices: bool = False
) -> PreTrainedModel:
    """Build a causal language model from `model.config`, with random weights; `in_slices`: without
    weights, if `shard` can draw them."""
    _require_known_settings(config)
    values = dict(config.config)
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", num_tokens(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values[name] = getattr(tokenizer, name)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        values["pad_token_id"] = None  # the row of a pad token would be 0
    try:
        model_config = AutoConfig.for_model(model_type, **values)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        build = partial(
            AutoModelForCausalLM.from_config,
            model_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        fits = model_config.get_text_config().vocab_size >= num_tokens(tokenizer)
        model = new_in_slices(build) if in_slices and fits else None
        if in_slices and model is None:
            why = "its weights are not drawn one by one" if fits else "its tables get further rows"
            say(f"model.config: each process makes the whole model, because {why}")
        return build() if model is None else model
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {error}") from error


def try_settings(
    config: ModelConfig, peft: PeftConfig, task_type: str = "CAUSAL_LM", field: str = "model.path"
) -> None:
    """Try `model.config`, `model.dropout` and the adapters of `peft` on the skeleton of a model.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        field: configuration key of `config.path`.

    Raises:
        InputError: `model.config` has an unknown name, or the model has no dropout or no layers
            with the names in `peft.target_modules`.
    """
    if config.path is None:
        _require_known_settings(config)
    if config.dropout is None and not peft.enabled:
        return
    model = _skeleton(config, task_type, field)
    if model is None:
        return
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if peft.enabled:
        add_lora(model, peft, task_type)


def _require_known_settings(config: ModelConfig) -> None:
    """Refuse a name in `model.config` that its model type does not have."""
    values = dict(config.config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InputError("model.config has no model_type, e.g. model.config.model_type=llama")
    try:
        own = AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        hint = nearest(str(model_type), CONFIG_MAPPING_NAMES)
        raise InputError(f"model.config.model_type={model_type} is not known.{hint}") from error
    known = {*own.to_dict(), *own.attribute_map}
    for name in values:
        if name not in known:
            raise InputError(
                f"model.config.{name} is not a setting of model_type={model_type}."
                f"{nearest(name, known)}"
            )


def _skeleton(config: ModelConfig, task_type: str, field: str) -> PreTrainedModel | None:
    """Build a model on the meta device; None if that fails: loading the model gives the reason."""
    code = config.trust_remote_code
    try:
        if config.path is None:
            settings: Any = AutoConfig.for_model(**config.config)
        else:
            directory = config_directory(config.path, field, config.revision, code)
            if is_gguf(directory):  # it holds the configuration too
                directory = find_source(config.path, field, config.revision, code).directory
            load = AutoConfig.from_pretrained
            settings = call_loader(load, directory, f"{field}={config.path}", code)
        factory: Any = AutoModelForCausalLM
        if task_type == "SEQ_CLS":
            factory, settings.num_labels = AutoModelForSequenceClassification, 1
        with torch.device("meta"):
            return factory.from_config(settings, trust_remote_code=code)
    except Exception:  # a model's own code can raise anything without numbers
        return None
