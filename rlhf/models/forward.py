"""Forward passes: inputs of a model, values of a critic, scores of a reward model.

Left out: log-probs of a policy, which are in `head.py`, and generation, which is in
`rlhf.sampling`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf.distributed import compute_device
from rlhf.models.attention import is_padding_free
from rlhf.zero import shape_of

HEAD = "score"


def has_linear_head(model: Any) -> bool:
    """True for a classifier with a linear head named `score`, which can be read at every token."""
    head = getattr(unwrap_peft(model), HEAD, None)
    return isinstance(getattr(head, "original_module", head), nn.Linear)  # PEFT wraps a trained one


def linear_head(weight: Tensor, bias: Tensor | None = None, device: Any = None) -> nn.Linear:
    """Make a float32 layer from a weight (1, H) and an optional bias (1,); it has its numbers on
    the head of a model without weights, too."""
    device = "cpu" if device is not None and torch.device(device).type == "meta" else device
    layer = nn.Linear(weight.shape[1], 1, bias=bias is not None, dtype=torch.float32, device=device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """Number the valid tokens of each row from 0, (B, L), with padding on either side.

    mask 0 0 1 1 1 0 -> positions 0 0 0 1 2 2
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def forward_inputs(model: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Build the inputs of a training or scoring forward pass, with right-padded rows.

    A causal model gets no mask, because a real token never sees the padding after it. With a mask,
    a padded query whose sliding window lies in the padding has no key at all, and cuDNN's attention
    gives NaN gradients for such queries. An encoder gets the mask. Positions are the model's own
    default, mostly 0, 1, 2, ...

    Args:
        input_ids, mask: (B, L) int64 and bool.

    A padding-free model gets the tokens of all rows in one row, (1, N), if any row is padded.

    Raises:
        ValueError: a row starts with padding.
    """
    if not mask[:, 0].all():
        raise ValueError("rows must be right-padded, but some masks start with False")
    inner = unwrap_peft(getattr(model, "module", model))
    if is_padding_free(inner) and not mask.all():
        positions = position_ids_from_mask(mask)
        return {"input_ids": input_ids[mask][None], "position_ids": positions[mask][None]}
    inputs = {"input_ids": input_ids}
    return inputs if is_causal(model) else inputs | {"attention_mask": mask.long()}


def positions_in_hidden(read_ids: Tensor, mask: Tensor, rows: Tensor, positions: Tensor) -> Any:
    """Index of the hidden states of `forward_inputs` that gives those of tokens.

    Args:
        read_ids: `input_ids` of `forward_inputs`, (B, L), or (1, N) without padding.
        mask: (B, L).
        rows, positions: of the tokens, of equal shape.
    """
    if read_ids.shape == mask.shape:
        return rows, positions
    lengths = mask.sum(dim=1)
    starts = lengths.cumsum(dim=0) - lengths
    within = torch.minimum(positions, lengths[rows] - 1)  # others are masked later
    return torch.zeros_like(rows), starts[rows] + within


def by_row(numbers: Tensor, mask: Tensor) -> Tensor:
    """Put what a model made of `forward_inputs` into rows: (B, L, ...) or (1, N, ...) -> (B, L,
    ...), 0 where masked in the second case."""
    if numbers.shape[:2] == mask.shape:
        return numbers
    rows = numbers.new_zeros(*mask.shape, *numbers.shape[2:])
    rows[mask] = numbers[0]
    return rows


def prefill_inputs(model: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Build the inputs of a sampler's forward pass, with left-padded rows; not for gradients, see
    `forward_inputs`."""
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids_from_mask(mask)
    return inputs


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """True if the output at a token does not depend on later tokens; measured once for each model:
    two rows with the same start must give the same there."""
    inner = unwrap_peft(getattr(model, "module", model))
    if not hasattr(inner, "_rlhf_is_causal"):
        num_ids, device = shape_of(inner.get_input_embeddings().weight)[0], compute_device(inner)
        rows = torch.tensor([[0, 1, 2, 3], [0, 1, num_ids - 1, num_ids - 2]], device=device)
        reader: Any = model if isinstance(model, FSDPModule) else inner.base_model
        with eval_mode(inner):
            hidden = reader(input_ids=rows % num_ids)[0]  # (2, 4, ...)
        # the same numbers in the same kernel: the results are equal to the last bit
        inner._rlhf_is_causal = torch.equal(hidden[0, :2], hidden[1, :2])
    return inner._rlhf_is_causal


@contextmanager
def without_padding_mask(model: nn.Module) -> Iterator[None]:
    """Keep the mask that a library passes for right-padded rows from a causal model, inside the
    block; see `forward_inputs`."""

    def drop(_: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {k: v for k, v in keywords.items() if k != "attention_mask"}

    if not is_causal(model):
        yield
        return
    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode inside the block; in training mode, checkpointed layers drop
    the cache. Afterwards the flags are as before."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class ScalarModel(nn.Module):
    """A one-label classifier read at every position: reward model (last token) or critic (all).

    Its values are normalised, (raw - mean) / std, so that a critic that starts from a reward model
    predicts the scores that PPO sees.
    """

    def __init__(self, model: Any, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    @property
    def _no_split_modules(self) -> Any:
        """The decoder block that accelerate shards by, as for a transformers model."""
        return unwrap_peft(self.model)._no_split_modules

    def forward(self, sequence_ids: Tensor, mask: Tensor) -> Tensor:
        """Return one number per token, (B, L) float32; the head is float32 even under autocast."""
        inner = unwrap_peft(self.model)
        inputs = forward_inputs(inner.base_model, sequence_ids, mask)
        hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            raw = getattr(inner, HEAD)(hidden.float()).squeeze(-1).float()
        return (by_row(raw, mask) - self.mean) / self.std


class TextModel(nn.Module):
    """A one-label classifier that scores a text as a whole with its own forward pass, such as BERT
    or DeBERTa; normalised like `ScalarModel`."""

    def __init__(self, model: Any, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one score per text, (B,) float32, from what the model's tokenizer returns."""
        taken = {name: value for name, value in inputs.items() if accepts(self.model, name)}
        if getattr(self.model.config, "type_vocab_size", None) in (0, 1):
            taken.pop("token_type_ids", None)
        raw = self.model(**taken).logits.squeeze(-1).float()
        return (raw - self.mean) / self.std


def sequence_scores(model: nn.Module, sequence_ids: Tensor, mask: Tensor) -> Tensor:
    """Score right-padded sequences at their last valid token, (B,) float32.

    Args:
        model: a `ScalarModel`, possibly wrapped.
        sequence_ids, mask: (B, L) int64 and bool.
    """
    values = model(sequence_ids, mask)
    last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=-1)
    return values.gather(1, last[:, None]).squeeze(1)


def decoder_blocks(model: Any) -> list[nn.Module]:
    """Return the decoder blocks of a transformers model."""
    names = set(model._no_split_modules or ())

    def is_block(module: nn.Module) -> bool:
        return type(module).__name__ in names

    blocks = [module for module in model.modules() if is_block(module)]
    return [b for b in blocks if not any(is_block(m) for m in b.modules() if m is not b)]


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper (its adapters stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, name: str) -> bool:
    """True if the model's own forward (inside any wrapper) takes an argument of this name; looked
    up once for each model, because samplers ask for each token."""
    inner = unwrap_peft(getattr(model, "module", model))
    if not hasattr(inner, "_rlhf_arguments"):
        inner._rlhf_arguments = frozenset(inspect.signature(inner.forward).parameters)
    return name in inner._rlhf_arguments
