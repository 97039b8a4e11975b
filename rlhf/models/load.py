"""The models of each role, ready to use: policy, reference, reward model, critic.

A model comes from files (`weights`) or from a configuration (`build`). Here it gets the tokenizer's
rows and ids and the settings of training, and its weights are checked.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import find_non_finite, find_non_finite_in
from rlhf.config import InputError, ModelConfig
from rlhf.console import say
from rlhf.distributed import loads_in_slices, zero_stage
from rlhf.gguf_files import is_gguf
from rlhf.hub import Source, find_source, read_json
from rlhf.models.build import build_model
from rlhf.models.dropout import disable_dropout, set_dropout
from rlhf.models.embeddings import resize_embeddings
from rlhf.models.forward import HEAD, has_linear_head, linear_head
from rlhf.models.quantization import require_quantized
from rlhf.models.sampling_settings import require_numbers
from rlhf.models.stacked import keep_apart
from rlhf.models.unread import adds_products, stand_ins, unread
from rlhf.models.weights import (
    load_backbone,
    load_classifier,
    load_language_model,
    put_stored_adapter,
)
from rlhf.tokenizer import end_token_ids, num_tokens
from rlhf.zero import recomputed, shape_of


def load_policy(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    field: str = "model.path",
    stacked: Path | None = None,
    in_slices: bool = False,
) -> PreTrainedModel:
    """Load or build a causal language model whose embedding table covers the tokenizer.

    Args:
        config: `path` is a Hub id, a directory or a GGUF file; adapters are merged into their base.
            Without a path, the model is built from `config.config` with random weights.
        field: configuration key of `path`, for messages.
        stacked: an adapter that stays apart from the model, frozen.
        in_slices: `shard` will be called on the model; so if the launcher shards, it may come
            without weights, which each process then reads in slices.

    Raises:
        InputError: `path` holds no language model in safetensors files, or a setting of the model
            is not valid.
    """
    if config.path is None:
        model = build_model(config, tokenizer, in_slices and loads_in_slices())
    else:
        model = load_language_model(_find(config, field, in_slices), config)
        require_numbers(model.generation_config, f"{field}={config.path}")
    _fit_tokenizer(model, tokenizer, config)
    if stacked is not None:
        label = f"the adapter in {stacked}"
        with stand_ins(model):
            model = keep_apart(put_stored_adapter(model, stacked, label), label)
    return _prepare(model, config, field)


def load_reference(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    field: str = "model.path",
    in_slices: bool = False,
) -> PreTrainedModel:
    """Load a frozen reference, by default a copy of the starting policy, from disk.

    A deepcopy of a trained model would follow it: TRL patches `forward` on the instance.
    """
    return freeze(load_policy(config, tokenizer, field, in_slices=in_slices))


def init_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, in_slices: bool = False
) -> PreTrainedModel:
    """Put a fresh scalar head on the backbone of a policy.

    Head weights are drawn from N(0, 1/sqrt(d + 1)) with d the hidden size (Stiennon et al. 2020,
    appendix B.1), in float32.
    """
    model = load_backbone(_find(config, "model.path", in_slices), config)
    _fit_tokenizer(model, tokenizer, config)
    head = getattr(model, HEAD)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((1, head.in_features), generator=generator)
    model.score = linear_head(weight / math.sqrt(head.in_features + 1), device=model.device)
    return _prepare(model, config, "model.path")


def load_reward_model(
    config: ModelConfig, field: str = "scorer.path", encoders: bool = False, in_slices: bool = False
) -> PreTrainedModel:
    """Load a trained reward model; a linear head stays in float32.

    Args:
        config: `path` is a Hub id or a directory of a sequence classifier with one label, or of an
            adapter that turns its base into one.
        field: configuration key of `path`, for messages.
        encoders: also accept a model that scores a text as a whole, without a linear head (BERT).

    Raises:
        InputError: the head has no weights (it never gets fresh ones), or several labels; or other
            weights are missing or left over.
    """
    model = load_classifier(_find(config, field, in_slices), config)
    if not encoders and not has_linear_head(model):
        raise InputError(
            f"{field}={config.path}: {type(model).__name__} scores a text as a whole: without a "
            f"linear head named {HEAD!r} it has no value for each token. It can be PPO's scorer, "
            "with critic.init=policy"
        )
    return _prepare(model, config, field)


def stored_stop_ids(config: ModelConfig) -> set[int]:
    """Return the EOS ids in the generation config of a model in a directory or on the Hub."""
    source, ids = _find(config, "model.path"), set[int]()
    for directory in (source.directory, *source.adapters):
        own = read_json(directory / "generation_config.json").get("eos_token_id", [])
        ids |= set(own) if isinstance(own, list) else {own}
    return ids


def freeze(model: Any) -> Any:
    """Switch off gradients and dropout, in place."""
    model.requires_grad_(False)
    disable_dropout(model)
    return model


def _prepare(model: PreTrainedModel, config: ModelConfig, field: str) -> PreTrainedModel:
    """Check the weights, and apply the settings of training, in place."""
    _require_finite(model, config, field)
    require_quantized(model, config)
    leave_out_router_logits(model)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model


def leave_out_router_logits(model: Any) -> None:
    """Have a mixture of experts return router logits only where they are asked for, in place: with
    a cache, its load-balancing loss fails on them."""
    settings = model.config.get_text_config()
    if getattr(settings, "output_router_logits", False):
        settings.output_router_logits = False


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, in place."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers renames
    settings = {"use_reentrant": False, "context_fn": recomputed} if zero_stage() == 3 else None
    (new_name or model.gradient_checkpointing_enable)(settings)


def _require_finite(model: PreTrainedModel, config: ModelConfig, field: str) -> None:
    waits = unread(model)
    if waits is not None:
        waits.settle(model, partial(_not_finite, config, field))
    elif problem := find_non_finite(model.state_dict().items()):
        raise _not_finite(config, field, problem)


def _not_finite(config: ModelConfig, field: str, problem: str) -> InputError:
    stored = find_non_finite_in(Path(str(config.path))) if config.path else None
    if stored is None and config.dtype == "float16":
        return InputError(
            f"{field}={config.path}: model.dtype=float16 cannot hold its weights: {problem}; set "
            "model.dtype=bfloat16 or float32"
        )
    return InputError(
        f"{field}={config.path} cannot be used: {stored or problem}; every weight must be a finite "
        "number: take an earlier checkpoint, or train it again"
    )


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, trainable parameters)."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # 4 bits: a byte holds two parameters
        size = math.prod(shape_of(parameter) if state is None else state.shape)
        total += size
        trainable += size * parameter.requires_grad
    return total, trainable


def _find(config: ModelConfig, field: str, in_slices: bool = False) -> Source:
    source = find_source(config.path, field, config.revision, config.trust_remote_code)
    if config.quantization is not None and source.adapters:
        raise InputError(
            f"model.quantization={config.quantization}: {field}={config.path} holds an adapter, "
            "which cannot be merged into a quantised base; merge it first: python -m rlhf.export "
            f"path={config.path} out=<new directory>"
        )
    if config.quantization is not None and is_gguf(source.directory):
        raise InputError(
            f"model.quantization={config.quantization}: {field}={config.path} is a GGUF file, "
            "which is read in floating point; write safetensors first: python -m rlhf.export "
            f"path={config.path} out=<new directory>"
        )
    if not in_slices or not loads_in_slices():
        return source
    if not all(map(adds_products, source.adapters)):
        say(
            f"{source.label}: each process reads the whole model, because an adapter that is more "
            "than LoRA on linear layers is merged into it; merge it once: python -m rlhf.export "
            f"path={config.path} out=<new directory>"
        )
        return source
    return replace(source, in_slices=True)


def _fit_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig
) -> None:
    """Give a model one row for each id of the tokenizer, and its special ids, in place.

    A list of several EOS ids stays, unless `model.eos_token` names one. The generation config,
    which servers use, also gets the other tokens that end an answer.
    """
    resize_embeddings(model, num_tokens(tokenizer), config.shrink_embeddings)
    table: Any = model.get_input_embeddings()
    table.padding_idx = None  # the row of EOS is trained where EOS pads too
    holders = [model.config, getattr(model, "generation_config", None)]
    for holder in (h for h in holders if h is not None):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id
        eos: Any = tokenizer.eos_token_id
        stop: Any = getattr(holder, "eos_token_id", None)
        keeps_own = isinstance(stop, list) and (config.eos_token is None or eos in stop)
        own = stop if keeps_own else []
        others = set() if holder is model.config else end_token_ids(tokenizer) - {eos}
        ids = [i for i in (eos, *sorted(others)) if i not in own] + own
        holder.eos_token_id = ids if own or others else eos
