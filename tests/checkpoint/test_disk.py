"""A disk that does not take what a run writes ends it in one line, and the run continues later.

Limits on the size of a file, a real full disk (a small tmpfs, where one can be mounted), a
directory that is deleted or read-only.

Run: python -m pytest tests/checkpoint/test_disk.py
"""

from __future__ import annotations

import errno
import os
import resource
import shutil

import pytest
import torch
from helpers.checkpoints import config_of
from helpers.disks import mounted, remount
from helpers.processes import Fork
from helpers.runs import directory_of, log_of, names, new_run, outcome, run_stage, text_of, train
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf.checkpoint import complete_or_nothing, disk_errors
from rlhf.checkpoint.run_directory import refuse_used_directory
from rlhf.config import InputError, ScorerConfig


def run_limited(config, log, limit) -> None:
    """Run a stage that may not write files of more than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    run_stage(config, log, 0, None, None)


def refusal(config, target=run_stage, *arguments) -> str:
    """The error that ends a run."""
    os.makedirs(config.runs_dir, exist_ok=True)
    process = Fork(target=target, args=(config, str(log_of(config)), *arguments))
    process.start()
    process.join(300)
    assert process.exitcode == 1, text_of(config)[-2000:]
    return text_of(config).split("InputError: ")[-1].split("\n")[0]


def finish(config) -> None:
    process = Fork(target=run_stage, args=(config, str(log_of(config)), 0, None, None))
    process.start()
    process.join(300)
    assert process.exitcode == 0, text_of(config)[-3000:]


def leftovers(config) -> list[str]:
    return names(directory_of(config), ".*") + names(directory_of(config), "*.tmp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, share", [("sft", 0.5), ("sft", 1.2), ("reward", 0.5), ("ppo", 0.5), ("ppo", 1.2)]
)
def test_limit_on_the_size_of_a_file_is_said_and_the_run_continues_without_it(
    stage, share, wholes, tmp_path
):
    """With a share of 1.2 the weights fit, and the state of the optimiser does not. That of the
    reward stage, which trains adapters, is smaller than the weights."""
    plain, directory, whole = wholes(stage)
    config = new_run(plain, tmp_path, "run")
    checkpoint = next(iter(directory.glob("checkpoint-*")))
    files = [f for f in checkpoint.glob("*.safetensors") if not f.name.startswith("optimizer")]
    limit = int(share * max(file.stat().st_size for file in files))
    message = refusal(config, run_limited, limit)
    assert message.startswith("cannot write ") and "File too large; raise the limit" in message
    assert message.endswith("(ulimit -f), then continue with resume=auto")
    assert leftovers(config) == [] and not (directory_of(config) / "final").exists()
    finish(config)
    assert outcome(config) == whole.outcome


@pytest.fixture
def small_disk(tmp_path):
    yield from mounted(tmp_path / "disk")


@pytest.mark.parametrize(
    "stage, num_checkpoints",
    [
        pytest.param("sft", 0.4, marks=pytest.mark.slow),
        pytest.param("sft", 1.5, marks=pytest.mark.slow),
        pytest.param("ppo", 1.5, marks=pytest.mark.slow),
    ],
)
def test_full_disk_is_said_and_the_run_continues_when_there_is_space(
    stage, num_checkpoints, small_disk, wholes, tmp_path
):
    plain, directory, whole = wholes(stage)
    checkpoint = next(iter(directory.glob("checkpoint-*")))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    disk = small_disk(int(num_checkpoints * size))
    config = new_run(plain, disk / "runs", "run")
    (tmp_path / "log").mkdir()
    logged = new_run(plain, tmp_path / "log", "run")  # the log is on another disk
    process = Fork(target=run_stage, args=(config, str(log_of(logged)), 0, None, None))
    process.start()
    process.join(300)
    assert process.exitcode == 1
    message = text_of(logged).split("InputError: ")[-1].split("\n")[0]
    assert message.startswith(f"cannot write {disk}")
    assert "No space left on device; free some space, then continue with resume=auto" in message
    assert leftovers(config) == []
    assert len(names(directory_of(config), "checkpoint-*")) == int(num_checkpoints)
    remount(disk, "size=1g")
    finish(config)
    assert outcome(config) == whole.outcome


def test_read_only_directory_is_refused_before_anything_is_loaded(small_disk, tmp_path):
    disk = small_disk(1 << 20)
    (disk / "runs/mine/sft").mkdir(parents=True)
    remount(disk, "ro")
    for values in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(InputError, match="sft cannot be written to; make it writable, or"):
            refuse_used_directory(config_of(disk / "runs", **values), "sft")


num_calls = 0


def deleting_scores(prompts, responses):
    """Score by length; delete the run's directory at the second call."""
    global num_calls
    num_calls += 1
    if num_calls == 2:
        shutil.rmtree(os.environ["RUN_TO_DELETE"])
    return [len(response) / 10 for response in responses]


def test_directory_that_vanishes_is_said(wholes, tmp_path, monkeypatch):
    config = new_run(wholes("ppo")[0], tmp_path, "run")
    config.scorer = ScorerConfig(f"python:{__name__}.deleting_scores", normalize="none")
    monkeypatch.setenv("RUN_TO_DELETE", str(directory_of(config).parent))
    with pytest.raises(InputError) as caught:
        train(config)
    file = directory_of(config) / "metrics.jsonl"
    assert str(caught.value) == (
        f"cannot write {file}: No such file or directory; it was deleted or moved while it was in "
        "use, then continue with resume=auto"
    )
    assert list(tmp_path.glob("run/*")) == []


# --- What counts as such an error -----------------------------------------------------------------


def message_of(error, directory) -> str:
    with pytest.raises(InputError) as caught, disk_errors(directory, "go on"):
        raise error
    return str(caught.value)


def test_errors_of_all_writers_are_read(tmp_path):
    with pytest.raises(InputError, match="No space left on device; free some space, then go on"):
        with disk_errors(tmp_path, "go on"), open("/dev/full", "w") as stream:
            stream.write("x")
    tensors = {"x": torch.zeros(3)}
    for write in (
        lambda: save_file(tensors, tmp_path / "no/x.safetensors"),
        lambda: torch.save(tensors, tmp_path / "no/x.pt"),
    ):
        with pytest.raises((SafetensorError, RuntimeError)):
            write()
    full = SafetensorError("Error while serializing: I/O error: ... (os error 28)")
    assert "No space left on device" in message_of(full, tmp_path)
    vanished = tmp_path / "vanished"
    with pytest.raises(InputError, match="vanished: No such file or directory; it was deleted"):
        with disk_errors(vanished, "go on"):
            torch.save(tensors, vanished / "x.pt")
    denied = OSError(errno.EACCES, "", str(tmp_path / "x"))
    assert f"cannot write {tmp_path / 'x'}: Permission denied; make it" in message_of(
        denied, tmp_path
    )


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "", "/elsewhere/data.jsonl"),
        PermissionError(errno.EACCES, "", "/elsewhere"),
        OSError("of a library, without a number"),
        RuntimeError("CUDA error"),
        SafetensorError("Error while deserializing header"),
    ],
)
def test_errors_of_another_kind_keep_their_traceback(error, tmp_path):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path, "go on"):
        raise error
    assert caught.value is error


def test_directory_that_cannot_be_completed_leaves_nothing(tmp_path):
    with pytest.raises(OSError), complete_or_nothing(tmp_path / "x") as temporary:
        (temporary / "half").write_text("x")
        raise OSError(errno.ENOSPC, "")
    assert list(tmp_path.iterdir()) == []
