"""Rows that processes sample from a model in slices, or from its copies: each its own, with other
numbers of passes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.config import ModelConfig
from rlhf.models import load_policy
from rlhf.sampling import generate, sampling_for, uniform_noise, use_engine
from rlhf.tokenizer import load_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5], [9] * 12]
TOKENS = 12
# rows of each process: the first has more batches; then the second has no row; then the reverse
SHARES = [([0, 1, 2], [3, 4]), ([0, 1, 2, 3, 4], []), ([4], [3, 2, 1, 0])]


def sampled(model, tokenizer, rows, **options):
    """Sample these rows, two at a time."""
    sampling = sampling_for(model, tokenizer, TOKENS, 1.0)
    noise = uniform_noise((1,), range(len(PROMPTS)), TOKENS)[rows]
    return generate(model, [PROMPTS[row] for row in rows], sampling, noise, 2, **options)


def sample_shares(model, tokenizer, rank: int, folder: Path) -> None:
    """Sample what this process has of each of `SHARES`, and write it down."""
    found = []
    for shares in SHARES:
        result = sampled(model, tokenizer, shares[rank])
        found.append([result.ids, result.logprobs, result.finished])
    (folder / f"shares-{rank}.json").write_text(json.dumps(found))


def require_same_from_copies(model, tokenizer, rank: int) -> None:
    """A copy in slices samples what a whole one does, to the last bit, in each type; in the type of
    the model, also the tokens of that."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for in_slices in (False, True):
            use_engine(model, dtype=dtype, in_slices=in_slices).refresh()
            found[dtype, in_slices] = [sampled(model, tokenizer, s[rank]) for s in SHARES]
        assert found[dtype, True] == found[dtype, False], dtype
    assert found[torch.float32, True] != found[torch.bfloat16, True]
    use_engine(model)
    itself = [sampled(model, tokenizer, s[rank]).ids for s in SHARES]
    assert itself == [made.ids for made in found[torch.float32, True]]


def assert_shares_of_one(path: Path, folder: Path) -> None:
    """What two processes have written is what one samples."""
    config = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config)
    one = sampled(load_policy(config, tokenizer), tokenizer, list(range(len(PROMPTS))))
    assert len({len(ids) for ids in one.ids}) > 2 and len(set(one.finished)) == 2
    for rank in (0, 1):
        found = json.loads((folder / f"shares-{rank}.json").read_text())
        for shares, (ids, logprobs, finished) in zip(SHARES, found, strict=True):
            rows = shares[rank]
            assert ids == [one.ids[row] for row in rows]
            assert finished == [one.finished[row] for row in rows]
            for mine, row in zip(logprobs, rows, strict=True):
                assert mine == pytest.approx(one.logprobs[row], rel=1e-5, abs=1e-6)
