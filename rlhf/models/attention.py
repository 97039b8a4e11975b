"""Attention over rows that follow one another without padding.

    rows 1 2 3 | 4 5  ->  ids 1 2 3 4 5, positions 0 1 2 0 1, bounds 0 3 5

`enable_padding_free` puts our attention on a model. The model then reads a batch of one row whose
positions restart as several rows, which do not see each other. All other batches take the attention
that the model had. On a GPU, `torch.nn.attention.varlen` (FlashAttention for ragged batches) reads
all rows at once; elsewhere the attention reads one row after the other.

A family can ignore the attention that is set, or compute something else around it: whether the
numbers stay the same is measured in `rlhf.equivalence`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_padding_free"
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")  # arguments that these kernels do not take
_without_mask: ContextVar[bool] = ContextVar("_without_mask", default=False)
_windows: ContextVar[set[int | None] | None] = ContextVar("_windows", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; causal and row by row, where bounds are given.

    Args:
        query: (1, H, N, D); key, value: (1, H or fewer, N, D).
        sliding_window: number of tokens that a token sees, with itself (None: all before it).
        cu_seq_lens_q: bounds, (rows + 1,) int32: the first token of each row and the end; None for
            other batches.
        max_length_q: tokens of the longest row.

    Returns:
        (1, N, H, D), and None in place of the weights.
    """
    if cu_seq_lens_q is None:
        others |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    if (windows := _windows.get()) is not None:
        windows.add(sliding_window)
    for name in CHANGES_SCORES:
        if others.get(name) is not None:
            raise ValueError(f"padding-free attention does not support {name}")
    query, key, value = (_as_attention_reads(x) for x in (query, key, value))
    if _has_kernel(query) and not dropout:
        sizes = cu_seq_lens_q, max_length_q
        return _varlen(query, key, value, scaling, sliding_window, *sizes), None
    return _in_rows(query, key, value, scaling, dropout, sliding_window, cu_seq_lens_q), None


def _as_attention_reads(x: Tensor) -> Tensor:
    """Under autocast, scaled dot-product attention reads all it gets in autocast's type; rotary
    embeddings leave queries and keys in float32."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype != torch.float32:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _has_kernel(query: Tensor) -> bool:
    """True where FlashAttention reads ragged rows."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _in_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    bounds: Tensor,
) -> Tensor:
    """Call scaled dot-product attention for each row: nothing is padded, and nothing is copied but
    the results."""

    def of_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = mask.tril().triu(1 - sliding_window)
        groups = q.shape[1] > k.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups
        )

    lengths = bounds.diff().tolist()
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([of_row(*row) for row in rows], dim=2).transpose(1, 2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    bounds: Tensor,
    longest: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    num_groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch >= 2.13
        options["enable_gqa"] = num_groups > 1
    else:
        key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    left = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    out: Any = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **options
    )
    return out[None]


@contextmanager
def watch_windows() -> Iterator[set[int | None]]:
    """Collect the sliding windows that our attention is given inside the block."""
    windows: set[int | None] = set()
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def _mask(*arguments: Any, **keywords: Any) -> Tensor | None:
    return None if _without_mask.get() else sdpa_mask(*arguments, **keywords)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


def is_padding_free(model: Any) -> bool:
    """True for a transformers model between `enable_padding_free` and `disable_padding_free`."""
    return hasattr(model.base_model, "_rlhf_hooks")


def enable_padding_free(model: Any) -> None:
    """Let a transformers model read one row whose positions restart as several rows, in place.

    Raises:
        ValueError: the model's attention is not the one whose place ours can take.
    """
    if is_padding_free(model):
        return
    if model.config._attn_implementation not in ("sdpa", NAME):
        raise ValueError(f"its attention is {model.config._attn_implementation}, not sdpa")
    written: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    if not written._can_set_attn_implementation():  # it reads the code around the class
        raise ValueError("its attention cannot be replaced")
    _set_attention(model, NAME)
    model.base_model._rlhf_hooks = [
        hook
        for part in {model, model.base_model}  # OPT's head calls only a part of its base model
        for hook in (
            part.register_forward_pre_hook(_find_rows, with_kwargs=True),
            part.register_forward_hook(_forget_rows, always_call=True),
        )
    ]


def disable_padding_free(model: Any) -> None:
    """Give the model the attention that it had, in place."""
    for hook in model.base_model.__dict__.pop("_rlhf_hooks", ()):
        hook.remove()
    if model.config._attn_implementation == NAME:
        _set_attention(model, "sdpa")


def _set_attention(model: Any, name: str) -> None:
    """Choose the attention of all layers, also of those with a copy of the config: switching
    dropout off gives them one."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    for module in model.modules():
        own = vars(module).get("config")
        if getattr(own, "_attn_implementation", None) == before:
            own._attn_implementation = name


def _find_rows(base: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the forward pass: tell the attention where rows begin."""
    if keywords.get("cu_seq_lens_q") is not None:
        _without_mask.set(True)
        return arguments, keywords
    positions = keywords.get("position_ids")
    has_more = keywords.get("attention_mask") is not None or keywords.get("past_key_values")
    if positions is None or len(positions) > 1 or has_more:
        return arguments, keywords
    starts = (positions[0] == 0).nonzero()[:, 0]
    end = starts.new_tensor([positions.shape[1]])
    bounds = torch.cat([starts, end]).int()
    if len(starts) < 2 or starts[0] != 0:
        return arguments, keywords
    _without_mask.set(True)
    # the names of flash attention in transformers, so that every layer passes them on
    longest = int(bounds.diff().max())
    names = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    return arguments, keywords | names | {"max_length_q": longest, "max_length_k": longest}


def _forget_rows(*_: Any) -> None:
    _without_mask.set(False)
