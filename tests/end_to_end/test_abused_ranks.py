"""What a machine or a person does to one of two processes, whole models (DDP) or slices (FSDP2) on
each: both end, the first names the rank, the phase and the error, no checkpoint is half written,
and the same command with resume=auto ends bit for bit as if nothing had happened.

Processes that fail by themselves are in test_failing_ranks.py.

Run: python -m pytest tests/end_to_end/test_abused_ranks.py -m slow
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import directory_of, lengths, outcome, train
from helpers.sharded import in_group, text_of
from test_failing_ranks import config_in

from rlhf.checkpoint import record, tensor_files
from rlhf.cli import hydra_main
from rlhf.ppo.update import Updater

pytestmark = pytest.mark.slow
TIMEOUT = 15  # seconds after which a process that hangs ends the others
SMALL = 20_000  # bytes; a checkpoint has more


def hangs_on_one(prompts, responses):
    """Score by length; hang on the second process in the second update, after an evaluation."""
    hangs_on_one.calls = getattr(hangs_on_one, "calls", 0) + 1
    if hangs_on_one.calls == 3 and os.environ["RANK"] == "1" and os.path.exists("../hangs"):
        time.sleep(2 * TIMEOUT)
    return lengths(prompts, responses)


def press_ctrl_c() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))


def stop_for_long() -> None:
    wakes = f"sleep {2 * TIMEOUT}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", wakes], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


# what happens -> the ranks that it happens to in their second update, and what it is
ABUSES = {
    "disk of 0": ([0], fill_disk),
    "disk of 1": ([1], fill_disk),
    "SIGSTOP": ([1], stop_for_long),
    "killed while saving": ([0], lambda: setattr(tensor_files, "write_tensors", die)),
    "Ctrl-C twice": ([0, 1], press_ctrl_c),
    "Ctrl-C twice to 1": ([1], press_ctrl_c),
}


def command(config, how: str, folder) -> None:
    """A run from the command line."""
    rank, plain = int(os.environ["RANK"]), Updater.accumulate
    os.chdir(folder / f"host-{rank}")
    ranks, act = ABUSES.get(how, ([], None))
    if how == "packages" and rank == 1:
        version = record.version
        record.version = lambda name: "9.9" if name == "peft" else version(name)

    def accumulate(self, batch, rows, update, *rest, **options):
        if update == 1 and rank in ranks:
            ranks.remove(rank)
            act()
        return plain(self, batch, rows, update, *rest, **options)

    Updater.accumulate = accumulate
    sys.argv = ["rlhf.sft", "recipe=demo"]  # composed, but in its place `config` is run
    hydra_main("sft", lambda _: train(config).stopped_by)


# what happens -> exit codes, whose last line it is, how that begins, and what is in it: one of |
ENDS = {
    "disk of 0": ((2, 2), 0, "error: cannot write /", ": File too large; raise the limit on "),
    "disk of 1": ((2, 2), 0, "error: a checkpoint was not written: rank 1: ", "File too large; "),
    "SIGSTOP": ((1, 1), 0, "error: no word from rank 1: killed", ", hanging, or"),
    "scorer": ((1, 1), 0, "error: no word from rank 1: killed", "rank 0 (scoring, update 2): "),
    "killed while saving": (
        (-9, 1),
        1,
        "error: no word from rank 0: killed",
        "(sampling, update 3): |(saving checkpoint-2): ",  # which the first did meanwhile
    ),
    "packages": ((2, 2), 0, "error: the processes were not started alike:\n  peft: ", "'9.9' on"),
    "Ctrl-C twice": ((130, 130), 0, "", ""),
    "Ctrl-C twice to 1": ((1, 130), 0, "error: rank 1 (training, update 2): KeyboardInterrupt", ""),
}


CASES = [(how, shards) for how in ENDS for shards in (False, True)]
CASES.remove(("disk of 1", False))  # it writes nothing


@pytest.mark.parametrize(("how", "shards"), CASES)
def test_abused_process_ends_both_and_the_run_goes_on_bit_identically(how, shards, tmp_path):
    config, log = config_in(tmp_path), tmp_path / "log"
    config.resume, config.distributed_timeout = "auto", TIMEOUT
    config.checkpoint.every, config.checkpoint.background = 1, not how.startswith("disk")
    config.scorer.path = f"python:{__name__}.hangs_on_one"
    whole = dataclasses.replace(config, run_name="whole")
    assert in_group(command, whole, "", tmp_path, log=log, shards=shards) == [0, 0], text_of(log)
    if how == "scorer":
        (tmp_path / "hangs").touch()
    log = tmp_path / "abused"
    codes = in_group(command, config, how, tmp_path, log=log, shards=shards)
    expected, speaker, begins, holds = ENDS[how]
    text = (tmp_path / f"abused-{speaker}").read_text()
    print(f"\n{how}, {shards}: {codes}\n{text[-700:]}")
    assert tuple(codes) == expected, (codes, text_of(log))
    last = text[text.rindex("error: ") :] if begins else text
    assert last.startswith(begins) and any(part in last for part in holds.split("|")), text
    assert "Traceback" not in text and "GLHF" not in text, text
    assert how == "packages" or "resume=auto" in last, last
    (tmp_path / "hangs").unlink(missing_ok=True)
    log = tmp_path / "again"
    assert in_group(command, config, "", tmp_path, log=log, shards=shards) == [0, 0], text_of(log)
    assert how == "packages" or "resuming from" in text_of(log)
    assert outcome(config) == outcome(whole)
    assert not list(directory_of(config).glob(".checkpoint*")), "nothing is half written"
