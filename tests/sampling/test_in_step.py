"""Two processes sample from a model in slices: other prompts, other numbers of passes, the tokens
of one process; both sample in the same way, and bad input on one does not leave the other waiting.

FSDP2 runs on the CPU here, see helpers/sharded.py; DeepSpeed's slices are in test_deepspeed.py.

Run: python -m pytest tests/sampling/test_in_step.py -m slow
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.allocations import Rounded
from helpers.runs import write_random_policy
from helpers.sampled_shares import (
    assert_shares_of_one,
    require_same_from_copies,
    sample_shares,
    sampled,
)
from helpers.sharded import in_group, text_of

from rlhf import engine_choice
from rlhf.config import InputError, ModelConfig
from rlhf.distributed import make_accelerator, share
from rlhf.models import copy_bytes, load_policy, shard, sliced_copy
from rlhf.sampling import engine_of, use_engine
from rlhf.sampling.in_step import in_step
from rlhf.slices import sliced_bytes
from rlhf.tokenizer import load_tokenizer


def refuse(row, ids):
    raise InputError(f"row {row} is refused")


def failure_on_the_second(model, tokenizer, rank) -> str:
    """The error of this process where the second one meets bad input while it samples."""
    try:
        sampled(model, tokenizer, [0, 1, 2], **({"ended": refuse} if rank else {}))
    except InputError as error:
        return str(error)
    return ""


def choice_if_a_copy_fails_on_the_second(model, tokenizer, rank) -> str:
    """How this process samples where the copy of the second one is measured to be wrong."""
    measure = engine_choice.cache_deviation  # both processes read the model together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_choice, "cache_deviation", lambda *given: measure(*given) + 9 * rank)
        said = engine_choice.choose_engine(model, tokenizer, dtype=torch.float32)
    assert engine_of(model).reads_slices
    return said


def rounded_in_passes(model, accelerator) -> list[int]:
    """Numbers that each of two passes rounds."""
    share(model, accelerator)  # accelerate puts its own autocast around forward
    ids, found = torch.arange(4)[None], []
    with torch.no_grad(), accelerator.autocast(), in_step(model):
        for _ in range(2):
            with Rounded() as rounded:
                model(input_ids=ids)
            found.append(rounded.count)
    assert torch.is_autocast_cache_enabled()
    return found


def gathered_in_a_pass(model) -> int:
    """Bytes that this process gathers in a pass."""
    name = "all_gather_single"
    if not hasattr(dist, name):  # before torch 2.13
        name = "all_gather_into_tensor"
    number, gather = 0, getattr(dist, name)

    def counted(output, *given, **options):
        nonlocal number
        number += output.nbytes
        return gather(output, *given, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dist, name, counted)
        model(input_ids=torch.arange(4)[None])
    return number


def sample_in_slices(path: Path, folder: Path) -> None:
    accelerator, config = make_accelerator("bfloat16"), ModelConfig(path=str(path))
    tokenizer, rank = load_tokenizer(config), int(os.environ["RANK"])
    model = load_policy(config, tokenizer, in_slices=True)
    shard(model)
    content = {"failure": failure_on_the_second(model, tokenizer, rank)}
    sample_shares(model, tokenizer, rank, folder)
    require_same_from_copies(model, tokenizer, rank)
    copied = use_engine(model, dtype=torch.float32).copy
    size = sum(p.nbytes for p in copied.parameters())
    assert copy_bytes(model, torch.float32) == sliced_bytes(model) == size
    copied = sliced_copy(model, torch.bfloat16)
    assert gathered_in_a_pass(model) == 2 * gathered_in_a_pass(copied) == size
    assert gathered_in_a_pass(copied) == sliced_bytes(copied)
    del copied
    content["choice"] = choice_if_a_copy_fails_on_the_second(model, tokenizer, rank)
    content["rounded"] = rounded_in_passes(model, accelerator)
    (folder / f"found-{rank}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_processes_sample_their_own_rows_of_a_model_in_slices_as_one_process_does(tmp_path):
    path, log = write_random_policy(tmp_path / "policy"), tmp_path / "log"
    assert in_group(sample_in_slices, path, tmp_path, log=log) == [0, 0], text_of(log)
    assert_shares_of_one(path, tmp_path)
    for rank in (0, 1):
        content = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert content["failure"].endswith(" is refused") if rank else not content["failure"]
        assert content["choice"].startswith("loop, because what it samples is not what the model")
        first, second = content["rounded"]
        assert first == second > 10_000, "no layer stays rounded"
