"""Do packing, padding and the cache leave a model's numbers as they are? Measured on the model
itself when a stage starts.

In some families, packed rows see each other, padding changes the numbers, or the cache gives
different numbers. Each function reads a few short rows in one of these ways and each row alone, and
refuses the model if the results differ. A list of families is not enough: attention
implementations, versions and models with their own code differ.

Of a model in slices, the processes read the same rows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from rlhf.config import InputError, one_line
from rlhf.data import pad
from rlhf.distributed import compute_device, ending_in_slices, is_sharded, whole
from rlhf.models import (
    ScalarModel,
    TextModel,
    accepts,
    by_row,
    compile_blocks,
    disable_padding_free,
    enable_padding_free,
    eval_mode,
    forward_inputs,
    is_causal,
    is_quantized,
    round_linear_weights,
    undo_first_pass,
    unwrap_peft,
    watch_windows,
)
from rlhf.sampling import Sampling, context_length, generate, uniform_noise
from rlhf.zero import is_zero, shape_of

NUM_STEPS = 6  # of the cache, after the prompt
FLAT = 20.0  # temperature at which nearly every token is sampled: contexts that none can guess


def require_packing(
    model: Any, tokenizer: Any, collator: Any, where: str, longest: int, fix: str
) -> None:
    """Refuse a model in which packed rows see each other, or that cannot read them.

    Args:
        collator: of the Trainer; it makes a batch of rows with `input_ids`, `labels` and, where
            they are packed, `seq_lengths`.
        where: the setting that packs them, e.g. "trainer.packing=true".
        longest: tokens of the longest sequence in training; if it exceeds the context, so does the
            sequence that is tried here.
    """
    rows = _rows(model, tokenizer)[1:]
    last, context = sum(map(len, rows)), context_length(model)
    is_long = longest > context and collator.padding_free
    fillers = [rows[0]] * (context // len(rows[0]) if is_long else 0)
    examples = [_packed([row]) for row in fillers] + [_packed(rows)]

    def measure() -> float:
        inputs = send_to_device(collator(examples), compute_device(model))
        del inputs["labels"]
        kept = inputs["input_ids"].shape[1] - sum(map(len, fillers))  # padding at the end included
        only = {"logits_to_keep": kept} if accepts(model, "logits_to_keep") else {}
        together = model(**inputs, **only, use_cache=False).logits[0, -kept:]
        parts = together[:last].split([len(row) for row in rows])
        return _deviation(parts, [_alone(model, row) for row in rows])

    what = "rows in one sequence see each other"
    _require(measure, model, where, what, fix)


def _packed(rows: Sequence[list[int]]) -> dict[str, list[int]]:
    ids = [token for row in rows for token in row]
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}


def require_cache(model: Any, tokenizer: Any, where: str, fix: str, num_rows: int = 3) -> None:
    """Refuse a model whose log-probs with the cache are not those without it.

    The prompts have different lengths, and the first ends early and is dropped from the cache.
    `where` is the setting of the model, e.g. "model.path=some/model".
    """
    what = "what is sampled with the cache is not what the model predicts without it"
    _require(lambda: cache_deviation(model, tokenizer, num_rows), model, where, what, fix)


def cache_deviation(model: Any, tokenizer: Any, num_rows: int, temperature: float = FLAT) -> float:
    """Deviation of the log-probs of sampled tokens from those that the model predicts without a
    cache, as a share of the spread of its logits."""
    prompts = _rows(model, tokenizer)[:num_rows]
    stop = cast(Any, _StopFirst() if num_rows > 1 else None)
    none = torch.empty(0, dtype=torch.long)
    sampling = Sampling(NUM_STEPS, (-1,), none, temperature, stop_strings=stop)
    noise = uniform_noise((0,), range(num_rows), NUM_STEPS)
    differences, scale = [], []
    with _left_as_it_was(model):
        sampled = generate(model, prompts, sampling, noise)
        for prompt, ids, logprobs in zip(prompts, sampled.ids, sampled.logprobs, strict=True):
            logits = _alone(model, [*prompt, *ids])[len(prompt) - 1 : -1].float()
            expected = (
                (logits / temperature).log_softmax(-1).gather(-1, _tensor(model, ids)[:, None])
            )
            differences.append(temperature * (_tensor(model, logprobs) - expected[:, 0]))
            scale.append(logits.std(dim=-1))
    spread = max(_rms(torch.cat(scale)), 0.1)  # nats; a flat model is compared with that
    return _rms(torch.cat(differences)) / spread


def require_padding(model: Any, tokenizer: Any, where: str, fix: str) -> None:
    """Refuse a causal LM, `ScalarModel` or `TextModel` whose numbers change with right padding."""
    rows = _rows(model, tokenizer)

    def measure() -> float:
        # RoBERTa numbers its positions by the pad token
        padded = _read(model, *_padded(model, rows, tokenizer.pad_token_id))
        parts = [padded[i, : len(row)] for i, row in enumerate(rows)]
        return _deviation(parts, [_alone(model, row) for row in rows])

    _require(measure, model, where, "it reads the padding of a batch", fix)


def choose_forward(model: Any, tokenizer: Any, wanted: str = "auto") -> str:
    """Let a causal LM or `ScalarModel` read rows without padding if its numbers stay the same, in
    place; logits and a gradient of a few rows are compared with those of each row alone.

    Args:
        wanted: `model.forward`.

    Returns:
        "padding-free", or "padded, because ..." with the reason.

    Raises:
        InputError: the model cannot do what `wanted` asks for.
    """
    inner = _inner(model)
    reason = _why_padded(model, tokenizer, wanted)
    if reason is None:
        inner.base_model._rlhf_forward = "padding-free"
    else:
        disable_padding_free(inner)
        inner.base_model._rlhf_forward = f"padded, because {reason}"
    if reason is not None and wanted == "padding_free":
        raise InputError(
            f"model.forward=padding_free: {type(inner).__name__} cannot be read without padding, "
            f"because {reason}; set model.forward=auto"
        )
    return inner.base_model._rlhf_forward


def _why_padded(model: Any, tokenizer: Any, wanted: str) -> str | None:
    """Make the model padding-free; return the reason where it must not be."""
    if wanted == "padded":
        return "model.forward=padded"
    reader = _inner(model).base_model if isinstance(model, ScalarModel) else model
    if isinstance(model, TextModel) or not is_causal(reader):
        return "it is not causal"
    try:
        with _left_as_it_was(model), torch.enable_grad():
            return _try_padding_free(model, tokenizer)
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:  # of our attention
        return str(error)
    except Exception as error:  # a model can raise anything at inputs that it cannot take
        return one_line(error)


def _try_padding_free(model: Any, tokenizer: Any) -> str | None:
    """Enable it, and return the reason where numbers change."""
    rows = _rows(model, tokenizer)
    ids, mask = _padded(model, rows, 0)
    trained = _smallest_trained(model)

    def gradient(numbers: Tensor) -> Tensor:
        return _gradient(numbers.float().square().mean(), trained[0], model).flatten()

    expected = [_alone(model, row) for row in rows]
    wanted = gradient(torch.cat(expected)) if trained else None
    with watch_windows() as windows:
        enable_padding_free(_inner(model))
        together = _read(model, ids, mask)[mask]
    limit = tolerance(model)
    if not (far := _deviation([together], expected)) <= limit:
        return f"the rows of a batch see each other (its numbers change by {far:.0%})"
    if wanted is not None and not (far := _deviation([gradient(together)], [wanted])) <= limit:
        return f"its gradients change by {far:.0%}"
    window = getattr(_inner(model).config, "sliding_window", None)
    if window is not None and windows == {None}:
        return "its sliding window is in the mask alone"
    return None


def _smallest_trained(model: nn.Module) -> list[nn.Parameter]:
    """The smallest parameter that trains, if one does; not the first factor of LoRA, whose gradient
    is 0 as long as the second factor is."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n]
    return [p for _, p in sorted(named, key=lambda item: shape_of(item[1]).numel())[:1]]


def _gradient(loss: Tensor, parameter: nn.Parameter, model: Any) -> Tensor:
    if is_zero(parameter) or not is_sharded(model):
        return torch.autograd.grad(loss, parameter)[0]
    loss.backward()  # gradients of FSDP2's slices exist only there
    assert parameter.grad is not None
    found = whole(parameter.grad)
    for other in model.parameters():
        other.grad = None
    return found


def compile_if_same(model: Any, tokenizer: Any) -> str:
    """Compile the decoder blocks of a causal LM or `ScalarModel`, in place, if logits and a
    gradient of a few rows stay the same up to rounding.

    Returns:
        "compiled", or "not compiled, because ..." with the reason.
    """
    rows = _rows(model, tokenizer)
    trained = _smallest_trained(model)

    def measure() -> list[Tensor]:
        with torch.no_grad():  # another graph than with gradients
            _alone(model, rows[0])
        numbers = [_alone(model, row).float() for row in rows]
        loss = torch.cat([n.flatten() for n in numbers]).square().mean()
        gradients = torch.autograd.grad(loss, trained) if trained else ()
        return [number.detach() for number in (*numbers, *gradients)]

    with _left_as_it_was(model), torch.enable_grad():
        expected = measure()
        undo = compile_blocks(_inner(model))
        try:
            far = max(_deviation([a], [b]) for a, b in zip(measure(), expected, strict=True))
            reason = f"its numbers change by {far:.0%}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler can raise anything
            far, reason = math.inf, one_line(error)
    if far <= tolerance(model):
        return "compiled"
    undo()
    return f"not compiled, because {reason}"


def store_as_read(model: Any, tokenizer: Any) -> str:
    """Store the linear weights of a frozen model as autocast reads them, in place, if a few rows
    give the same numbers to the last bit.

    Args:
        model: causal LM, `ScalarModel` or `TextModel`; it is used under this autocast from now on.

    Returns:
        "bfloat16", or "float32, because ..." with the reason.
    """
    kind = compute_device(model).type
    stored = str(_inner(model).dtype).removeprefix("torch.")
    if not torch.is_autocast_enabled(kind):
        return stored
    dtype, rows = torch.get_autocast_dtype(kind), _rows(model, tokenizer)
    with _left_as_it_was(model):
        expected = [_alone(model, row) for row in rows]
        undo = round_linear_weights(model, dtype)
        try:
            same = all(map(torch.equal, [_alone(model, row) for row in rows], expected))
            reason = "its numbers change"
        except (RuntimeError, ValueError, TypeError) as error:  # code that reads a weight itself
            same, reason = False, one_line(error)
    if same:
        return str(dtype).removeprefix("torch.")
    undo()
    return f"{stored}, because {reason} otherwise"


class _StopFirst:
    """Used as `StopStrings`: ends only the first row that has two tokens."""

    strings = ("",)

    def __init__(self) -> None:
        self._ended = False

    def end(self, ids: Sequence[int]) -> bool:
        now = len(ids) == 2 and not self._ended
        self._ended |= now
        return now


# --- Measuring ------------------------------------------------------------------------------------


def _require(measure: Callable[[], float], model: Any, where: str, what: str, fix: str) -> None:
    inner = _inner(model)
    family = f"{type(inner).__name__} ({inner.config.model_type})"
    try:
        with _left_as_it_was(model):
            deviation = measure()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model can raise anything at inputs that it cannot take
        raise InputError(
            f"{where}: {family} cannot be used for this, as it fails with {one_line(error)}; {fix}"
        ) from error
    if not deviation <= tolerance(model):  # negated, so that nan fails too
        raise InputError(
            f"{where}: {family} cannot be used for this, as {what} (its numbers change by "
            f"{deviation:.0%} of their spread; rounding explains {tolerance(model):.2%}); {fix}"
        )


def tolerance(model: Any) -> float:
    """Largest deviation that rounding explains, as a share of the spread of the numbers.

    It is the square root of the rounding unit: half of the digits agree. Rounding costs a few bits
    per layer; a model that reads tokens it must not read loses nearly all digits. Layers of 8 or 4
    bits round their inputs row by row, up to a tenth.
    """
    if any(is_quantized(module) for module in model.modules()):
        return 0.25
    inner = _inner(model)
    kind, dtypes = compute_device(inner).type, [inner.dtype]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    if kind == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.append(torch.bfloat16)  # TF32 or less, also for float32 tensors
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Without dropout and gradients; restore modes, random numbers and 8-bit layers at the end."""
    device = compute_device(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), eval_mode(model), ending_in_slices(model):
        yield
    undo_first_pass(model)


def _rows(model: Any, tokenizer: Any) -> list[list[int]]:
    """Three short rows of different lengths, of tokens that have no special meaning."""
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    longest = max(3, min(9, context_length(_inner(model)) // 3))
    generator = torch.Generator().manual_seed(0)
    lengths = (longest // 3, longest - 2, longest)
    draws = [torch.randint(len(ids), (length,), generator=generator) for length in lengths]
    return [ids[draw].tolist() for draw in draws]


def _padded(model: Any, rows: list[list[int]], token: int) -> tuple[Tensor, Tensor]:
    device, full = compute_device(model), [[True] * len(row) for row in rows]
    return pad(rows, token, device=device), pad(full, False, device=device)


def _inner(model: Any) -> Any:
    """The transformers model, which knows its dtype: a `ScalarModel` has a float32 head."""
    return unwrap_peft(model.model if isinstance(model, ScalarModel | TextModel) else model)


def _alone(model: Any, row: Sequence[int]) -> Tensor:
    ids = _tensor(model, [list(row)])
    return _read(model, ids, torch.ones_like(ids, dtype=torch.bool))[0]


def _read(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, L, V) of a causal LM, values (B, L) of a `ScalarModel`, scores (B, 1) of a
    `TextModel`."""
    torch.clear_autocast_cache()  # a gradient after several passes is too late for FSDP2's slices
    if isinstance(model, ScalarModel):
        return model(ids, mask)
    if isinstance(model, TextModel):
        return model({"input_ids": ids, "attention_mask": mask.long()})[:, None]
    return by_row(model(**forward_inputs(model, ids, mask), use_cache=False).logits, mask)


def _deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of the difference, relative to that of the numbers around their mean."""
    left, right = torch.cat(list(actual)).float(), torch.cat(list(expected)).float()
    spread = _rms(right - right.mean(dim=-1, keepdim=True))
    # a few scores may happen to be nearly equal
    return _rms(left - right) / max(spread, 0.1 * _rms(right), torch.finfo(torch.float32).tiny)


def _rms(numbers: Tensor) -> float:
    return float(numbers.detach().square().mean().sqrt())


def _tensor(model: Any, values: Any) -> Tensor:
    return torch.tensor(values, device=compute_device(model))
