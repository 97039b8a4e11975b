"""A checkpoint that is written in the background is that of its moment, complete or absent.

Run: python -m pytest tests/checkpoint/test_background_saving.py
"""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest
import torch
from helpers.checkpoints import names
from helpers.processes import Fork
from helpers.runs import directory_of, finish, new_run, outcome, start

from rlhf.checkpoint import NonFiniteError, find_damage, read_manifest, saving, tensor_files
from rlhf.checkpoint.ownership import remove_unfinished
from rlhf.checkpoint.saving import CheckpointWriter
from rlhf.checkpoint.state import load_training_state
from rlhf.config import CheckpointConfig, StageConfig


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this is set."""
    gate, write = threading.Event(), tensor_files.write_tensors

    def waits(file, parts, go_on):
        assert gate.wait(300)
        write(file, parts, go_on)

    monkeypatch.setattr(tensor_files, "write_tensors", waits)
    yield gate
    gate.set()


def writer_and_weights():
    config = StageConfig(checkpoint=CheckpointConfig(keep_last=9))
    return CheckpointWriter(config, in_background=True), {"w": torch.arange(6.0)}


def save(writer, directory, step, weights):
    checkpoint = directory / f"checkpoint-{step}"
    writer.save(checkpoint, {"policy": weights}, {}, {"update": step}, None)


def test_background_checkpoint_is_of_the_moment_at_which_it_was_taken(gate, tmp_path):
    writer, weights = writer_and_weights()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save(writer, tmp_path, 1, weights)
    weights["w"].zero_()  # training goes on
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    assert not (tmp_path / "checkpoint-1").exists()
    gate.set()
    writer.finish()
    checkpoint = tmp_path / "checkpoint-1"
    assert find_damage(checkpoint) is None
    assert read_manifest(checkpoint)["logs"] == {"metrics.jsonl": 3}
    assert load_training_state(checkpoint, {"policy": weights}, {}) == {"update": 1}
    assert weights["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_next_checkpoint_waits_for_the_one_before(tmp_path):
    writer, weights = writer_and_weights()
    for step in (1, 2, 3):
        save(writer, tmp_path, step, weights)
    assert {"checkpoint-1", "checkpoint-2"} <= set(names(tmp_path))
    writer.finish()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_error_of_the_background_comes_up_at_the_next_boundary(gate, monkeypatch, tmp_path):
    writer, weights = writer_and_weights()
    gate.set()
    save(writer, tmp_path, 1, weights)
    writer.finish()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_tensors", full)
    save(writer, tmp_path, 2, weights)
    with pytest.raises(OSError, match="No space left"):
        save(writer, tmp_path, 3, weights)
    assert writer.failed and names(tmp_path) == ["checkpoint-1"]
    assert not list(tmp_path.glob(".checkpoint*"))


def test_run_that_ends_at_once_leaves_no_half_checkpoint(gate, monkeypatch, capsys, tmp_path):
    writer, weights = writer_and_weights()
    save(writer, tmp_path, 1, weights)
    monkeypatch.setattr(saving, "STOP_SECONDS", 300)
    threading.Thread(target=lambda: writer._abandoned.wait(300) and gate.set()).start()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    assert "the last checkpoint was not written: the run ended first" in capsys.readouterr().err


def test_run_that_fails_keeps_a_checkpoint_that_becomes_complete_in_time(gate, tmp_path):
    writer, weights = writer_and_weights()
    save(writer, tmp_path, 1, weights)
    threading.Timer(0.2, gate.set).start()
    writer.abandon(wait_seconds=300)
    assert names(tmp_path) == ["checkpoint-1"]


def die_in_the_second_save(directory):
    """Be killed by SIGKILL while a thread writes."""
    writer, weights = writer_and_weights()
    save(writer, directory, 1, weights)
    writer.finish()
    write = tensor_files.write_tensors

    def dies(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.write_tensors = dies
    save(writer, directory, 2, weights)
    writer.finish()


def test_killed_background_write_leaves_the_checkpoint_before(tmp_path):
    process = Fork(target=die_in_the_second_save, args=(tmp_path,))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [".checkpoint-2.tmp", "checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_number_that_is_not_finite_is_refused_before_training_goes_on(tmp_path):
    writer, weights = writer_and_weights()
    weights["w"][2] = torch.nan
    problem = "checkpoint-1 was not written: policy.safetensors: w holds nan"
    with pytest.raises(NonFiniteError, match=problem):
        save(writer, tmp_path, 1, weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ppo_run_that_saves_in_the_background_ends_bit_identically(wholes, tmp_path):
    plain, _, whole = wholes("ppo")
    background = CheckpointConfig(every=1, keep_last=9, background=True)
    config = new_run(plain, tmp_path, "run", checkpoint=background)
    finish(start(config), config)
    assert outcome(config) == whole.outcome
    checkpoints = names(directory_of(config))
    assert checkpoints[:7] == [f"checkpoint-{update}" for update in range(1, 8)]
