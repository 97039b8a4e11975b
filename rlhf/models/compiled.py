"""Decoder blocks compiled by torch.compile, for training and scoring passes.

All blocks of a model share their code, so that one compilation serves them all; lengths and numbers
of rows are dynamic. With a cache, which the sampler uses, a block runs as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from rlhf.models.forward import decoder_blocks, unwrap_peft


def why_not_compiled() -> str | None:
    """The reason where this machine cannot compile, in words."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if any(map(shutil.which, names)):
        return None
    return f"there is no C++ compiler ({', '.join(names)})"


def compile_blocks(model: Any) -> Callable[[], None]:
    """Compile the decoder blocks of a transformers model, in place, at their first pass.

    Returns: a function that puts the plain blocks back.
    """
    blocks = decoder_blocks(unwrap_peft(model))

    def undo() -> None:
        for block in blocks:
            block.__dict__.pop("forward", None)

    for block in blocks:
        block.forward = _choose(block.forward)
    return undo


def _choose(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        has_cache = any(isinstance(x, Cache) for x in (*arguments, *keywords.values()))
        return (plain if has_cache else compiled)(*arguments, **keywords)

    return forward
