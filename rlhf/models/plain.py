"""The plain model again, adapters merged or left out: for files, or as a copy that samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.checkpoint import NonFiniteError, find_non_finite_on_any
from rlhf.console import is_main_process
from rlhf.distributed import (
    compute_device,
    detached,
    is_sharded,
    move,
    offloads,
    slice_weights,
    whole,
)
from rlhf.models.attention import is_padding_free
from rlhf.models.forward import HEAD, unwrap_peft
from rlhf.models.quantization import dequantized_weight, is_quantized
from rlhf.models.stacked import kept_delta
from rlhf.slices import in_file, like
from rlhf.zero import gathering

STORED_DTYPE = "_rlhf_stored_dtype"  # attribute of a model: the type of the weights in its files


def merged(model: Any, folder: Path | None = None) -> PreTrainedModel:
    """Return the plain model. If it has adapters, merge them into copies of the weights in main
    memory, after dequantising what bitsandbytes has quantised. The result has the type in which the
    base is stored, if that is smaller than the one of training; a scalar head is not rounded.

    All processes that share a sharded model call this together; only the main one gets a new model,
    which can be written but not run: its weights are in files of `folder`, put together one by one,
    so that no process holds the model.

    Raises:
        NonFiniteError: on all processes, if one has a slice that is not finite.
    """
    if is_sharded(model):
        return _merged_in_files(model, folder)
    if not isinstance(model, PeftModel):
        return model
    base = cast(Any, unwrap_peft(model))
    plain = _empty_plain(base)
    state = {name: _as_stored(base, name, t.cpu()) for name, t in _merged_weights(model, plain)}
    plain.load_state_dict(state)
    for name, parameter in plain.named_parameters():
        # Each in its own dtype: `plain.to` would round a float32 head and the rotary frequencies.
        parameter.data = parameter.data.to(state[name].dtype)
    return plain


def _merged_in_files(model: Any, folder: Path | None) -> PreTrainedModel:
    """`merged` of a model in slices."""
    base = cast(Any, unwrap_peft(model))
    if problem := find_non_finite_on_any(model.named_parameters()):
        raise NonFiniteError(f"the result was not written: {problem}")
    with torch.device("meta"):
        plain = _empty_plain(base)
    state = {}
    for name, tensor in _merged_weights(model, plain):
        if is_main_process():
            state[name] = in_file(_as_stored(base, name, tensor), folder)
    if not is_main_process():
        return base
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    return plain


def _empty_plain(base: Any) -> Any:
    """A model without adapters of the same form, whose weights are yet to come."""
    plain = type(base)(_plain_config(base))
    if any(key.startswith(f"{HEAD}.") and key.endswith(".bias") for key in base.state_dict()):
        plain.score = nn.Linear(plain.score.in_features, 1)  # the families' heads have no bias
    plain.generation_config = getattr(base, "generation_config", None)
    if hasattr(base.base_model, "_rlhf_forward"):  # how it was trained, for its record
        plain.base_model._rlhf_forward = base.base_model._rlhf_forward
    return plain


def _as_stored(base: Any, name: str, tensor: Tensor) -> Tensor:
    """A weight in the type of the base's files, if that is smaller; a head keeps its own."""
    stored: torch.dtype = getattr(base, STORED_DTYPE, torch.float32)
    is_wider = tensor.is_floating_point() and tensor.dtype.itemsize > stored.itemsize
    return tensor.to(stored) if is_wider and not name.startswith(f"{HEAD}.") else tensor


def plain_copy(model: Any, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """Return a second causal LM without adapters on a device, by default the same, in this type and
    in eval mode; `copy_weights` writes its weights."""
    base = unwrap_peft(model)
    # our attention is for training alone
    attention = "sdpa" if is_padding_free(base) else base.config._attn_implementation
    with torch.device(device) if device else compute_device(base):
        plain = type(base)._from_config(
            _plain_config(base), dtype=dtype, attn_implementation=attention
        )
    _take_buffers(plain, base)
    plain.generation_config = base.generation_config
    return plain.requires_grad_(False).eval()


def sliced_copy(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """`plain_copy` of a model in slices, in slices of FSDP2, also where those of the model are
    DeepSpeed's; they wait in main memory if the launcher asks for that."""
    device = compute_device(unwrap_peft(model))
    plain = plain_copy(model, dtype, "meta")
    slice_weights(plain, offloads())
    place = "cpu" if offloads() else device
    plain._apply(lambda t: torch.empty_like(t, device=place) if t.is_meta else t)
    move(plain, device)  # masks and frequencies
    return plain


def _take_buffers(plain: nn.Module, base: nn.Module) -> None:
    """Give a new model the masks and frequencies of another one: made in a smaller type, those of
    some families are rounded, and on the meta device they are empty."""
    taken = {_plain_name(name): b for name, b in base.named_buffers(remove_duplicate=False)}
    for name, buffer in [*plain.named_buffers(remove_duplicate=False)]:
        owner, _, own = name.rpartition(".")
        plain.get_submodule(owner)._buffers[own] = taken[name].to(buffer.dtype, copy=True)


def _plain_name(name: str) -> str:
    """The name of a tensor of a model with adapters, in the plain one."""
    return name.replace(".token_adapter", "").replace(".base_layer", "")


def copy_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights of `plain_copy`."""
    with torch.device("meta"):
        plain = _empty_plain(unwrap_peft(model))
    return sum(weight.numel() for weight in plain.parameters()) * dtype.itemsize


@torch.no_grad()
def copy_weights(model: Any, plain: nn.Module, with_adapter: bool = True) -> None:
    """Write the weights of a model, its adapter merged or left out, into one from `plain_copy` or
    `sliced_copy`, in place."""
    targets = plain.state_dict()
    for name, tensor in _merged_weights(model, plain, with_adapter):
        targets[name].copy_(like(tensor, targets[name]))


def _plain_config(base: Any) -> Any:
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    return config


def _merged_weights(
    model: Any, plain: nn.Module, with_adapter: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the plain model's weights, one after the other; what an adapter adds
    to comes a second time, with it."""
    base = unwrap_peft(model)
    names = plain.state_dict().keys()  # leaves out adapters, and the scales of quantised weights
    if not isinstance(model, PeftModel):
        weights = base.state_dict(keep_vars=True)
        yield from ((k, whole(detached(v))) for k, v in weights.items() if k in names)
        return
    adapter = model.active_adapter
    packed = {name for name, module in base.named_modules() if is_quantized(module)}
    state = {}
    for key, value in base.state_dict(keep_vars=True).items():
        name = _plain_name(key.replace(f".modules_to_save.{adapter}", ""))
        if name in names and ".original_module" not in key and key.rpartition(".")[0] not in packed:
            state[name] = detached(value)
    yield from ((key, whole(value)) for key, value in state.items())
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensLayer) and with_adapter:
            table = whole(detached(cast(Any, module.get_base_layer()).weight))
            rows = whole(detached(module.trainable_tokens_delta[adapter])).to(table)
            index = torch.tensor(module.token_indices[adapter], device=table.device)
            weight = table.index_copy(0, index, rows)
            yield f"{name.removesuffix('.token_adapter')}.weight", weight
        elif isinstance(module, LoraLayer) and not is_quantized(module.get_base_layer()):
            # PEFT wraps a layer of experts once for each weight: experts, experts.base_layer
            key = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
            deltas = [kept_delta(module.get_base_layer())]
            if with_adapter:
                layer = cast(Any, module)
                with gathering(p for n, p in layer.named_parameters() if "lora_" in n):
                    deltas.append(layer.get_delta_weight(adapter).detach())
            added = sum(whole(delta) for delta in deltas if delta is not None)
            yield key, (whole(state[key]) + added).to(state[key].dtype)
        elif (kept := kept_delta(module)) is not None and f"{name}.weight" in state:
            # no adapter that trains is on this layer
            value = whole(state[f"{name}.weight"])
            yield f"{name}.weight", (value + kept).to(value.dtype)
    yield from _dequantized_weights(base, adapter if with_adapter else None, plain)


def _dequantized_weights(
    base: Any, adapter: str | None, plain: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the quantised layers in floating point, with what the adapter adds."""
    for name, module in base.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not is_quantized(layer) or name.endswith(".base_layer"):
            continue
        weight = dequantized_weight(layer)
        if (kept := kept_delta(layer)) is not None:
            weight = weight + kept
        if layer is not module and adapter is not None:
            weight = weight + cast(Any, module).get_delta_weight(adapter).detach()
        if isinstance(plain.get_submodule(name), Conv1D):
            weight = weight.T.contiguous()  # GPT-2 stores its weights transposed
        yield f"{name}.weight", weight.to(base.dtype)
        if layer.bias is not None:  # bitsandbytes casts it to its compute dtype
            yield f"{name}.bias", layer.bias.detach().to(base.dtype)
