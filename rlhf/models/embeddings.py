"""Embedding tables with one row for every id of the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlhf.config import InputError
from rlhf.hub import read_json


def resize_embeddings(model: PreTrainedModel, num_rows: int, shrink: bool = False) -> None:
    """Give the embedding tables `num_rows` rows, in place. New rows are the mean of the old rows,
    which do not change.

    A table that is already larger (Pythia pads its own) keeps its size, as its surplus ids are
    never sampled, unless `shrink` cuts it. Rows of the model's own special tokens cannot be cut.
    """
    old = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if old == num_rows or (old > num_rows and not shrink):
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model.config, name, None)
        lost = [i for i in (ids if isinstance(ids, list) else [ids]) if (i or 0) >= num_rows]
        if lost and shrink:
            raise InputError(
                f"model.shrink_embeddings=true leaves {num_rows} rows, one for each id of the "
                f"tokenizer, but the model's own {name} is {lost[0]}: the tokenizer belongs to "
                "another model; correct model.tokenizer, or set model.shrink_embeddings=false"
            )
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    if old > num_rows:
        return
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            for table in (module.weight, getattr(module, "bias", None)):  # GPT-J's head has one
                if table is not None:
                    table[old:] = table[:old].mean(dim=0)


def pad_arguments(directory: Path) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that leave out a pad token beyond the table: it has no
    row, which torch refuses, and any id can pad."""
    settings = read_json(directory / "config.json")
    pad, size = settings.get("pad_token_id"), settings.get("vocab_size")
    beyond = isinstance(pad, int) and isinstance(size, int) and pad >= size
    return {"pad_token_id": None} if beyond else {}
