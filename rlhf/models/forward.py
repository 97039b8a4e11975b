"""Forward passes: response logits of a policy, values of a critic, scores of a reward model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HEAD = "score"


def has_linear_head(model: Any) -> bool:
    """True for a classifier that can be read at every token: its head is a layer named `score`."""
    return isinstance(getattr(model, HEAD, None), nn.Linear)


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """Number the valid tokens of each row from 0, whatever the side of the padding.

    mask 0 0 1 1 1 0 -> positions 0 0 0 1 2 2

    Args:
        mask: (B, L) bool, True where valid.

    Returns:
        (B, L) int64.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def forward_inputs(model: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Build the inputs of a forward pass: ids, mask, and positions where the family takes any."""
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids_from_mask(mask)
    return inputs


def response_logits(
    model: Any, sequence_ids: Tensor, mask: Tensor, num_response: int, forbidden: Tensor
) -> Tensor:
    """Return the logits that predict the response tokens, without materialising the prompt's.

    Args:
        model: a causal LM, possibly wrapped by PEFT or by a distributed wrapper.
        sequence_ids: (B, P + T) int64, left-padded prompts followed by right-padded responses.
        mask: (B, P + T) bool.
        num_response: T.
        forbidden: ids whose logits become -inf.

    Returns:
        (B, T, V) in the model's dtype; row t predicts response token t.
    """
    inputs = forward_inputs(model, sequence_ids, mask)
    if accepts(model, "logits_to_keep"):
        # The head reads a slice there, and torch multiplies a slice otherwise by a weight that
        # requires a gradient than by a frozen one: KL to an equal reference would be 1e-6, not 0.
        head = unwrap_peft(getattr(model, "module", model)).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(),))
        try:
            logits = model(**inputs, logits_to_keep=num_response + 1, use_cache=False).logits
        finally:
            hook.remove()
    else:
        logits = model(**inputs, use_cache=False).logits[:, -num_response - 1 :]
    logits = logits[:, :-1]
    return (
        logits.index_fill(-1, forbidden.to(logits.device), -math.inf) if len(forbidden) else logits
    )


class ScalarModel(nn.Module):
    """A one-label classifier read at every position: reward model (last token) or critic (all).

    Its numbers are normalised, (raw - mean) / std, so that a critic that starts from a reward model
    predicts the scores that PPO sees.
    """

    def __init__(self, model: Any, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    @property
    def _no_split_modules(self) -> Any:
        """The decoder block that accelerate shards by, as it asks a transformers model."""
        return unwrap_peft(self.model)._no_split_modules

    def forward(self, sequence_ids: Tensor, mask: Tensor) -> Tensor:
        """Return one number per token, (B, L) float32; the head is float32 even under autocast."""
        inner = unwrap_peft(self.model)
        inputs = forward_inputs(inner.base_model, sequence_ids, mask)
        hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            raw = getattr(inner, HEAD)(hidden.float()).squeeze(-1).float()  # (B, L)
        return (raw - self.mean) / self.std


class TextModel(nn.Module):
    """A one-label classifier that scores a text as a whole by its own forward pass, such as BERT or
    DeBERTa; normalised as `ScalarModel` is."""

    def __init__(self, model: Any, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one score per text, (B,) float32.

        Args:
            inputs: what the model's tokenizer returns; what the model does not take is left out.
        """
        taken = {name: value for name, value in inputs.items() if accepts(self.model, name)}
        if getattr(self.model.config, "type_vocab_size", None) in (0, 1):
            taken.pop("token_type_ids", None)
        raw = self.model(**taken).logits.squeeze(-1).float()
        return (raw - self.mean) / self.std


def sequence_scores(model: nn.Module, sequence_ids: Tensor, mask: Tensor) -> Tensor:
    """Score each sequence at its last valid token.

    Args:
        model: a `ScalarModel`, possibly wrapped.
        sequence_ids: (B, L) int64; padding on either side.
        mask: (B, L) bool.

    Returns:
        (B,) float32.
    """
    values = model(sequence_ids, mask)
    last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=-1)
    return values.gather(1, last[:, None]).squeeze(1)


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper (its adapters stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, name: str) -> bool:
    """True if the model's own forward (inside any wrapper) takes an argument of this name."""
    inner = unwrap_peft(getattr(model, "module", model))
    return name in inspect.signature(inner.forward).parameters
