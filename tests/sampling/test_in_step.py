"""Two processes sample from a model in slices: other prompts, other numbers of passes, the tokens
of one process.

FSDP2 runs on the CPU here, see helpers/sharded.py.

Run: python -m pytest tests/sampling/test_in_step.py -m slow
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.runs import write_random_policy
from helpers.sharded import in_group, text_of
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.config import InputError, ModelConfig
from rlhf.distributed import make_accelerator, share, sliced_bytes
from rlhf.models import copy_bytes, load_policy, shard
from rlhf.sampling import generate, sampling_for, uniform_noise, use_engine
from rlhf.sampling.in_step import in_step
from rlhf.tokenizer import load_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5], [9] * 12]
TOKENS = 12
# rows of each process: the first has more batches; then the second has no row; then the reverse
SHARES = [([0, 1, 2], [3, 4]), ([0, 1, 2, 3, 4], []), ([4], [3, 2, 1, 0])]


def sampled(model, tokenizer, rows, **options):
    sampling = sampling_for(model, tokenizer, TOKENS, 1.0)
    noise = uniform_noise((1,), range(len(PROMPTS)), TOKENS)[rows]
    return generate(model, [PROMPTS[row] for row in rows], sampling, noise, 2, **options)


class Rounded(TorchDispatchMode):
    """Counts the numbers that are rounded to bfloat16."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.numel()
        return result


def refuse(row, ids):
    raise InputError(f"row {row} is refused")


def sample_in_slices(path: Path, folder: Path) -> None:
    """Sample each share; then fail on the second process, and sample again; then count what passes
    round to bfloat16."""
    accelerator, config = make_accelerator("bfloat16"), ModelConfig(path=str(path))
    tokenizer, rank = load_tokenizer(config), int(os.environ["RANK"])
    model = load_policy(config, tokenizer, in_slices=True)
    shard(model)
    found = []
    for shares in SHARES:
        result = sampled(model, tokenizer, shares[rank])
        found.append([result.ids, result.logprobs, result.finished])
    failure = ""
    try:
        sampled(model, tokenizer, [0, 1, 2], **({"ended": refuse} if rank else {}))
    except InputError as error:
        failure = str(error)
    again = sampled(model, tokenizer, SHARES[0][rank])
    assert [again.ids, again.logprobs, again.finished] == found[0]

    copied = use_engine(model, dtype=torch.float32).copy
    assert copy_bytes(model, torch.float32) == sum(p.nbytes for p in copied.parameters())
    assert sliced_bytes(model) == sum(p.nbytes for p in copied.parameters())
    del copied
    use_engine(model)
    share(model, accelerator)  # accelerate puts its own autocast around forward
    ids, rounded = torch.arange(4)[None], []
    with torch.no_grad(), accelerator.autocast(), in_step(model):
        for _ in range(2):
            with Rounded() as number:
                model(input_ids=ids)
            rounded.append(number.count)
    assert torch.is_autocast_cache_enabled()
    content = {"found": found, "failure": failure, "rounded": rounded}
    (folder / f"found-{rank}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_processes_sample_their_own_rows_of_a_model_in_slices_as_one_process_does(tmp_path):
    path, log = write_random_policy(tmp_path / "policy"), tmp_path / "log"
    config = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config)
    one = sampled(load_policy(config, tokenizer), tokenizer, list(range(len(PROMPTS))))
    assert len({len(ids) for ids in one.ids}) > 2 and len(set(one.finished)) == 2
    assert in_group(sample_in_slices, path, tmp_path, log=log, seconds=60) == [0, 0], text_of(log)
    for rank in (0, 1):
        content = json.loads((tmp_path / f"found-{rank}.json").read_text())
        for shares, (ids, logprobs, finished) in zip(SHARES, content["found"], strict=True):
            rows = shares[rank]
            assert ids == [one.ids[row] for row in rows]
            assert finished == [one.finished[row] for row in rows]
            for mine, row in zip(logprobs, rows, strict=True):
                assert mine == pytest.approx(one.logprobs[row], rel=1e-5, abs=1e-6)
        assert content["failure"].endswith(" is refused") if rank else not content["failure"]
        first, second = content["rounded"]
        assert first == second > 10_000, "no layer stays rounded"
