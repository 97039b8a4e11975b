"""Which engine samples from a model: chosen when a stage or command starts, and measured.

A family can have a cache that cannot have a fixed size, read sizes from the host inside a step, or
compute something else there: what an engine samples is compared with what the model predicts
without a cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object

from rlhf.config import InputError, one_line
from rlhf.distributed import compute_device, is_sharded
from rlhf.equivalence import cache_deviation, tolerance
from rlhf.models import unwrap_peft
from rlhf.sampling import CHECK_EVERY, VLLM, use_engine
from rlhf.sampling.vllm_weights import moved_adapter

MOST_TEMPERATURE = 2.0  # that vLLM takes


def choose_engine(
    model: Any,
    tokenizer: Any,
    wanted: str = "auto",
    field: str = "engine",
    check_every: int = CHECK_EVERY,
    dtype: torch.dtype | None = None,
    num_rows: int = 3,
    in_slices: bool = False,
) -> str:
    """Let `generate` sample from a causal LM with an engine, in place. `graph`, and a copy of the
    model, must sample what the model itself predicts without a cache.

    Args:
        wanted: "auto", "loop" or "graph"; `field` is the setting that has this value.
        dtype, in_slices: of a copy that samples, see `Engine`.

    Returns:
        "graph", or "loop, because ..." with the reason, and what is special.

    Raises:
        InputError: the model cannot do what `wanted` asks for.
    """
    kind, name, reason = compute_device(model).type, wanted, ""
    if wanted == "auto":
        name = "graph" if kind == "cuda" and not in_slices else "loop"
        reason = "" if kind == "cuda" else f"{field}=auto takes it on a CPU"
    options: dict[str, Any] = {"check_every": check_every, "dtype": dtype, "in_slices": in_slices}
    failed = _why_not(model, tokenizer, name, num_rows, **options)
    if is_sharded(model):  # all processes must sample in the same way
        failed = next(filter(None, gather_object([failed])), "")
    if failed and wanted != "auto":
        raise InputError(
            f"{field}={wanted}: {type(unwrap_peft(model)).__name__} cannot sample so, because "
            f"{failed}; set {field}=auto"
        )
    if failed:
        name, reason, dtype = "loop", failed, None
        use_engine(model)
    parts = [f"{name}, because {reason}" if reason else name]
    if name == "graph" and kind != "cuda":
        parts.append("without CUDA graphs, because the policy is on a CPU")
    if dtype is not None:
        parts.append(f"by a copy of the policy in {str(dtype).removeprefix('torch.')}")
    return ", ".join(parts)


def choose_server(model: Any, tokenizer: Any, server: VLLM, dtype: torch.dtype | None) -> str:
    """Let `generate` sample from a causal LM by a vLLM server, in place; return that in words.

    Raises:
        InputError: the server does not answer, or does not sample what the model predicts.
    """
    sent = dtype or unwrap_peft(model).dtype
    said = server.begin(model, tokenizer, sent)
    engine = use_engine(model, "vllm", dtype=dtype, server=server)
    as_adapter, type_name = server.way == "adapter", str(sent).removeprefix("torch.")
    with moved_adapter(model) if as_adapter else nullcontext():
        engine.refresh()
        far = cache_deviation(model, tokenizer, 3, MOST_TEMPERATURE)
    limit = max(tolerance(model), torch.finfo(sent).eps ** 0.5)
    if not far <= limit:  # negated, so that nan fails too
        raise InputError(
            f"sampling.engine=vllm: log-probs of {server.url} are not those of the policy (they "
            f"differ by {far:.2%} of the spread of the logits; rounding explains {limit:.2%}): it "
            "has other weights, rounds otherwise or gives raw log-probs; start it with "
            f"--logprobs-mode processed_logprobs --dtype {type_name}"
            + as_adapter
            * "; or its LoRA is not ours for this family: set sampling.weights=files"
        )
    return f"{said} ({server.sent} in {type_name}; a probe differs by {far:.1e})"


def _why_not(model: Any, tokenizer: Any, name: str, num_rows: int, **options: Any) -> str:
    """Set the engine; return the reason where the model must not use it."""
    try:
        engine = use_engine(model, name, **options)
        if name == "loop" and options["dtype"] is None:
            return ""  # `require_cache` has measured it
        engine.refresh()
        far = cache_deviation(model, tokenizer, num_rows)
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:  # of `GraphDecoder`
        return str(error)
    except Exception as error:  # a model can raise anything at inputs that it cannot take
        return one_line(error)
    limit = max(tolerance(model), tolerance(engine.copy or model))
    if not far <= limit:  # negated, so that nan fails too
        return f"what it samples is not what the model predicts (log-probs change by {far:.0%})"
    return ""
