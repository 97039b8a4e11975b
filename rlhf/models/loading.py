"""Loading and building: policy, reference, reward model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from rlhf.checkpoint import find_non_finite, find_non_finite_in
from rlhf.config import InputError, ModelConfig, nearest
from rlhf.hub.source import Source, find_source
from rlhf.models.dropout import disable_dropout, set_dropout
from rlhf.models.embeddings import resize_embeddings
from rlhf.models.forward import HEAD, has_linear_head
from rlhf.models.quantization import check_quantized
from rlhf.models.stored import (
    linear_head,
    load_backbone,
    load_classifier,
    load_language_model,
)
from rlhf.tokenizer import end_token_ids, num_tokens


def load_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, field: str = "model.path"
) -> PreTrainedModel:
    """Load or build a causal language model whose embedding table covers the tokenizer.

    Args:
        config: `path` is a Hub id or a directory (adapters are merged into their base, and all of
            the model can be trained); without it the model is built from `config.config`, with
            random weights.
        field: configuration key of `path`, for messages.

    Raises:
        InputError: nothing can be loaded from there, it is no language model, only pickled weights
            are there, or `model.config` is not valid; or the model cannot be quantised, or has no
            dropout, where that is asked for.
    """
    if config.path is None:
        model = _build(config, tokenizer)
    else:
        model = load_language_model(_find(config, field), config)
    resize_embeddings(model, num_tokens(tokenizer), config.shrink_embeddings)
    _set_special_tokens(model, tokenizer, keep_own=config.eos_token is None)
    return _prepare(model, config, field)


def load_reference(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a frozen copy of the starting policy, from disk: never a deepcopy of a trained model.

    TRL's SFTTrainer patches `forward` on the instance; a deepcopy of it keeps calling the original
    model and so follows the policy.
    """
    reference = load_policy(config, tokenizer)
    return freeze(reference)


def init_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Put a fresh scalar head on the backbone of a policy.

    Head weights are drawn from N(0, 1/sqrt(d + 1)) with d the hidden size (Stiennon et al. 2020,
    appendix B.1), kept in float32.

    Raises:
        InputError: as `load_policy`, or the family has no classifier with a linear head.
    """
    model = load_backbone(_find(config, "model.path"), config)
    resize_embeddings(model, num_tokens(tokenizer), config.shrink_embeddings)
    _set_special_tokens(model, tokenizer, keep_own=config.eos_token is None)
    head = getattr(model, HEAD)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((1, head.in_features), generator=generator)
    model.score = linear_head(weight / math.sqrt(head.in_features + 1), device=model.device)
    return _prepare(model, config, "model.path")


def load_reward_model(
    config: ModelConfig, field: str = "scorer.path", encoders: bool = False
) -> PreTrainedModel:
    """Load a trained reward model; a linear head stays in float32.

    Args:
        config: `path` is a Hub id or a directory of a sequence classifier with one label, or of an
            adapter that makes one of its base.
        field: configuration key of `path`, for messages.
        encoders: take a model with another head too, which scores a text as a whole (BERT,
            DeBERTa).

    Raises:
        InputError: there are no weights for the head (a fresh head is never substituted), or not of
            one label; others are missing or left over; or the model has no linear head.
    """
    model = load_classifier(_find(config, field), config)
    if not encoders and not has_linear_head(model):
        raise InputError(
            f"{field}={config.path}: {type(model).__name__} scores a text as a whole: it has no "
            f"linear head named {HEAD!r}, and so no value for each token. It can be a scorer of "
            "PPO, with critic.init=policy"
        )
    return _prepare(model, config, field)


def freeze(model: Any) -> Any:
    """Switch off gradients and dropout, in place."""
    model.requires_grad_(False)
    disable_dropout(model)
    return model


def _prepare(model: PreTrainedModel, config: ModelConfig, field: str) -> PreTrainedModel:
    """Check the weights, and apply the settings of training, in place."""
    _check_finite(model, config, field)
    check_quantized(model, config)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.gradient_checkpointing:
        # transformers is renaming it
        renamed = getattr(model, "activation_checkpointing_enable", None)
        (renamed or model.gradient_checkpointing_enable)()
    return model


def _check_finite(model: PreTrainedModel, config: ModelConfig, field: str) -> None:
    problem = find_non_finite(model.state_dict().items())
    if problem is None:
        return
    stored = find_non_finite_in(Path(str(config.path))) if config.path else None
    if stored is None and config.dtype == "float16":
        raise InputError(
            f"{field}={config.path}: model.dtype=float16 cannot hold its weights: {problem}; set "
            "model.dtype=bfloat16 or float32"
        )
    raise InputError(
        f"{field}={config.path} cannot be used: {stored or problem}; every weight must be a finite "
        "number: take an earlier checkpoint, or train it again"
    )


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, trainable parameters)."""

    def size(parameter: nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)  # of 4 bits: two parameters in a byte
        return parameter.numel() if state is None else math.prod(state.shape)

    return (
        sum(size(p) for p in model.parameters()),
        sum(size(p) for p in model.parameters() if p.requires_grad),
    )


def use_bfloat16(precision: str) -> bool:
    """Decide whether forward passes run under bfloat16 autocast; "auto": on a GPU that has it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


def check_model_config(config: ModelConfig) -> None:
    """Check the names in `model.config`, which a model is built from, before data is read.

    Raises:
        InputError: no model type, an unknown one, or a name that this type does not have.
    """
    if config.path is not None:
        return
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
                f"model.config.{name} is no setting of model_type={model_type}."
                f"{nearest(name, known)}"
            )


def _build(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    check_model_config(config)
    values = dict(config.config)
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", num_tokens(tokenizer))
    special = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    try:
        model_config = AutoConfig.for_model(model_type, **values, **special)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {error}") from error


def _find(config: ModelConfig, field: str) -> Source:
    source = find_source(config.path, field, config.revision, config.trust_remote_code)
    if config.quantization is not None and source.adapters:
        raise InputError(
            f"model.quantization={config.quantization}: {field}={config.path} holds an adapter, "
            "which cannot be merged into a quantised base; merge it first: python -m rlhf.export "
            f"path={config.path} out=<new directory>"
        )
    return source


def _set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep_own: bool
) -> None:
    """Give a model the ids of its tokenizer; a list of several EOS ids stays, if `keep_own`.

    The generation config, which servers obey, is also given the other tokens that end an answer.
    """
    holders = [model.config, getattr(model, "generation_config", None)]
    for holder in (h for h in holders if h is not None):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id
        eos, stop = tokenizer.eos_token_id, holder.eos_token_id
        own = stop if isinstance(stop, list) and (keep_own or eos in stop) else []
        others = set() if holder is model.config else end_token_ids(tokenizer) - {eos}
        ids = [i for i in (eos, *sorted(others)) if i not in own] + own
        holder.eos_token_id = ids if own or others else eos
