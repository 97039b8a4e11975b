"""Tokenizer and embedding tables: special tokens, chat template, rows for every id."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import InputError, ModelConfig, load_object
from rlhf.models.hub import from_hub_or_disk

PAD_TOKEN = "<|pad|>"


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a pad token of its own and a chat template.

    A missing pad token, or one equal to EOS, is replaced by a new `<|pad|>`: PPO never samples the
    pad token, and libraries that look for "the last token that is not pad" would otherwise miss the
    EOS.

    Args:
        config: `tokenizer` (falls back to `path`) is a Hub id, a directory or
            `python:module.function`; `chat_template` is set when given, else the tokenizer's own is
            kept, else `plain` is used.

    Raises:
        InputError: nothing can be loaded from there, or the tokenizer has no EOS token.
    """
    from rlhf.data import chat_template_text

    source = config.tokenizer or config.path
    assert source is not None
    if source.startswith("python:"):
        tokenizer = load_object(source, "model.tokenizer")()
    else:
        tokenizer = from_hub_or_disk(
            AutoTokenizer.from_pretrained,
            source,
            "model.tokenizer" if config.tokenizer else "model.path",
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {source} has no EOS token; set it in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if config.chat_template is not None:
        tokenizer.chat_template = chat_template_text(config.chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template_text("plain")
    return tokenizer


def forbidden_token_ids(tokenizer: PreTrainedTokenizerBase, num_logits: int) -> Tensor:
    """Ids that a policy never emits: the pad token and the padded rows of the embedding table.

    Their logits become -inf in sampling and in every log-prob alike.

    Args:
        num_logits: width of the language-model head.
    """
    ids = set(range(num_tokens(tokenizer), num_logits))
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids), dtype=torch.long)


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding table needs: the largest id + 1, which is more than the number of
    tokens where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def resize_embeddings(model: PreTrainedModel, num_rows: int) -> None:
    """Grow the embedding tables to `num_rows` rows, in place; new rows are the mean of the old.

    A table that is already larger (Pythia pads its own) is left alone: its surplus ids are never
    sampled.
    """
    old = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if old >= num_rows:
        return
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight[old:] = module.weight[:old].mean(dim=0)
