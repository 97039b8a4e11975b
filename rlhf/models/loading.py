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
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config import InputError, ModelConfig
from rlhf.models.dropout import disable_dropout, set_dropout
from rlhf.models.forward import HEAD
from rlhf.models.hub import from_hub_or_disk
from rlhf.models.quantization import check_quantized, quantization_arguments
from rlhf.models.vocabulary import num_tokens, resize_embeddings

ADAPTER = "adapter_config.json"


def load_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load or build a causal language model whose embedding table covers the tokenizer.

    Args:
        config: `path` is a Hub id or a directory (an adapter directory is merged into its base);
            without it the model is built from `config.config`, with random weights.

    Raises:
        InputError: nothing can be loaded from there, only pickled weights are there, or
            `model.config` is not valid; or the model cannot be quantised, or has no dropout,
            where that is asked for.
    """
    if config.path is None:
        model = _build(config, tokenizer)
    else:
        if config.quantization is not None and (Path(config.path) / ADAPTER).is_file():
            raise InputError(
                f"model.quantization={config.quantization}: model.path={config.path} holds an "
                "adapter, which cannot be merged into a quantised base; merge it first: python -m "
                f"rlhf.export path={config.path} out=<new directory>"
            )
        model = from_hub_or_disk(
            _load_causal_lm, config.path, "model.path", **_load_arguments(config)
        )
    resize_embeddings(model, num_tokens(tokenizer), config.shrink_embeddings)
    _set_special_tokens(model, tokenizer, keep_own=config.eos_token is None)
    return _prepare(model, config)


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
    """
    assert config.path is not None
    model = _load_classifier(config, "model.path")
    resize_embeddings(model, num_tokens(tokenizer), config.shrink_embeddings)
    _set_special_tokens(model, tokenizer, keep_own=config.eos_token is None)
    head = getattr(model, HEAD)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    model.score = nn.Linear(
        head.in_features, 1, bias=False, dtype=torch.float32, device=head.weight.device
    )
    with torch.no_grad():
        model.score.weight.copy_(weight)
    return _prepare(model, config)


def load_reward_model(config: ModelConfig, field: str = "scorer.path") -> PreTrainedModel:
    """Load a trained reward model; its head stays in float32.

    Raises:
        InputError: the directory holds no weights for the scalar head (a fresh head is never
            substituted), or weights of another shape.
    """
    assert config.path is not None
    model, info = _load_classifier(
        config, field, output_loading_info=True, ignore_mismatched_sizes=True
    )
    misfits = {name for name, *_ in info["mismatched_keys"]}
    misfits |= {name for name in info["missing_keys"] if name.startswith(f"{HEAD}.")}
    if misfits:
        raise InputError(
            f"{field}={config.path} has no weights for {', '.join(sorted(misfits))} that fit: it "
            "is not a reward model with one label; give the final/ directory of a reward stage"
        )
    if model.dtype != torch.float32:
        _restore_head(model, Path(config.path))
    return _prepare(model, config)


def freeze(model: Any) -> Any:
    """Switch off gradients and dropout, in place."""
    model.requires_grad_(False)
    disable_dropout(model)
    return model


def _prepare(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Apply the settings of training, in place."""
    check_quantized(model, config)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.gradient_checkpointing:
        # transformers is renaming it
        renamed = getattr(model, "activation_checkpointing_enable", None)
        (renamed or model.gradient_checkpointing_enable)()
    return model


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


def _build(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    values = dict(config.config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InputError("model.config has no model_type, e.g. model.config.model_type=llama")
    values.setdefault("vocab_size", num_tokens(tokenizer))
    special = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    try:
        model_config = AutoConfig.for_model(model_type, **values, **special)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        return AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=config.attn_implementation
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {error}") from error


def _load_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "revision": config.revision,
        "dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
    } | quantization_arguments(config)


def _load_causal_lm(path: str, use_safetensors: bool, **kwargs: Any) -> PreTrainedModel:
    if (Path(path) / ADAPTER).is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, **kwargs).merge_and_unload()
    kwargs |= {"use_safetensors": use_safetensors, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"there are no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def _load_classifier(config: ModelConfig, field: str, **kwargs: Any) -> Any:
    loaded = from_hub_or_disk(
        AutoModelForSequenceClassification.from_pretrained,
        config.path,
        field,
        num_labels=1,
        **_load_arguments(config),
        **kwargs,
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(
            f"{field}={config.path}: {type(model).__name__} has no linear head named {HEAD!r}"
        )
    return loaded


def _restore_head(model: PreTrainedModel, directory: Path) -> None:
    """Read the head again in float32: a half-precision load rounded it."""
    from safetensors import safe_open

    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if f"{HEAD}.weight" in tensors.keys():
                weight = tensors.get_tensor(f"{HEAD}.weight").float()
                head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32)
                head.weight.data.copy_(weight)
                model.score = head.to(model.device)


def _set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep_own: bool
) -> None:
    """Give a model the ids of its tokenizer; a list of several EOS ids stays, if `keep_own`."""
    holders = [model.config, getattr(model, "generation_config", None)]
    for holder in (h for h in holders if h is not None):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id
        stop = holder.eos_token_id
        if not isinstance(stop, list) or not (keep_own or tokenizer.eos_token_id in stop):
            holder.eos_token_id = tokenizer.eos_token_id
        elif tokenizer.eos_token_id not in stop:
            holder.eos_token_id = [tokenizer.eos_token_id, *stop]
