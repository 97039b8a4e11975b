"""Special tokens: EOS, pad and further tokens of one id each; the ids that a policy never emits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.config import InputError, ModelConfig
from rlhf.tokenizer.ids import token_ids

if TYPE_CHECKING:  # commands import this room before they need torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<|pad|>"


def set_special_tokens(tokenizer: Any, config: ModelConfig, source: str) -> None:
    """Add `special_tokens`, then replace EOS and pad where the configuration names them.

    Raises:
        InputError: a token is not one id, or pad would be EOS.
    """
    if config.special_tokens:
        tokens = {"extra_special_tokens": config.special_tokens}
        tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    for token in config.special_tokens:
        _require_one_id(tokenizer, "special_tokens", token, source)
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is not None:
            _require_one_id(tokenizer, name, token, source)
            tokenizer.add_special_tokens({name: token})
    if config.pad_token is not None and config.pad_token == tokenizer.eos_token:
        raise InputError(
            f"model.pad_token={config.pad_token!r} is also the EOS token of {source}, but PPO "
            "never samples the pad token: no response could end; give another one, or null for a "
            f"new {PAD_TOKEN}"
        )


def _require_one_id(tokenizer: Any, name: str, token: str, source: str) -> None:
    """Refuse a token that is not encoded as its own id, alone and inside a text."""
    alone, inside = token_ids(token, tokenizer), token_ids(f"\n\n{token}x", tokenizer)
    own = tokenizer.convert_tokens_to_ids(token)
    if alone == [own] and own in inside and tokenizer.convert_ids_to_tokens(own) == token:
        return
    if name == "special_tokens":
        fix = "choose tokens so that none is part of another"
    else:
        fix = f"add it to model.special_tokens: model.special_tokens=[{token!r}]"
    what = f"{len(alone)} ids, {alone}" if len(alone) != 1 else f"other ids inside a text, {inside}"
    raise InputError(
        f"model.{name}={token!r} must be one id at every place in a text, but the tokenizer of "
        f"{source} splits it into {what}; {fix}"
    )


def forbidden_token_ids(tokenizer: PreTrainedTokenizerBase, num_logits: int) -> Tensor:
    """Ids that a policy never emits: the pad token and the padded rows of the embedding table.

    Their logits become -inf both in sampling and in every log-prob.

    Args:
        num_logits: width of the language-model head.
    """
    import torch

    ids = set(range(num_tokens(tokenizer), num_logits))
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids), dtype=torch.long)


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding table needs: the largest id + 1. Ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1
