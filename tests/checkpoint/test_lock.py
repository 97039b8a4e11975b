"""A run directory has one writer at a time, and so has a file of scores.

Leaves out what a disk does not take (test_disk.py).

Run: python -m pytest tests/checkpoint/test_lock.py
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import socket
import sys
import time

import pytest
from helpers.checkpoints import snapshot
from helpers.ports import held_port
from helpers.processes import FORKS, Fork
from helpers.runs import directory_of, new_run, outcome, start, text_of, train, wait_for
from helpers.scorers import policy_tokenizer, write_reward_model

from rlhf.checkpoint import locked
from rlhf.checkpoint.lock import one_writer
from rlhf.checkpoint.ownership import facts_of_run, seal
from rlhf.config import InputError, SFTStageConfig

HERE = socket.gethostname()


def hold(file, ready) -> None:
    """Hold a lock until killed; a forked child outlives this process, as a DataLoader's may."""
    with locked(file, "x", ""):
        if not os.fork():
            ready.send(os.getpid())  # it has closed the lock's file by now
            time.sleep(600)
            os._exit(0)
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds a lock: file -> (process, id of its forked child)."""
    started = []

    def begin(file):
        ours, theirs = FORKS.Pipe()
        process = Fork(target=hold, args=(file, theirs))
        process.start()
        started.append((process, ours.recv()))
        return started[-1]

    yield begin
    for process, child in started:
        process.kill()
        process.join()
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_held_lock_is_refused_with_host_and_process_and_a_dead_holders_is_free(holder, tmp_path):
    file = tmp_path / "lock"
    process, child = holder(file)
    with pytest.raises(InputError, match=f"^x is in use, by process {process.pid} on {HERE}; go$"):
        with locked(file, "x", "go"):
            raise AssertionError("two writers")
    process.kill()
    process.join()
    os.kill(child, 0)  # the forked child lives on, and holds nothing
    assert str(process.pid) in file.read_text()
    with locked(file, "x", "go"):
        assert str(os.getpid()) in file.read_text()
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(file, "x", "go"):
            pass  # nor twice in one process
    assert not file.exists()


def test_a_child_that_leaves_the_block_leaves_the_lock_to_its_parent(tmp_path):
    file, parent = tmp_path / "lock", os.getpid()
    try:
        with locked(file, "x", "go"):
            if child := os.fork():
                assert os.waitpid(child, 0)[1] == 0
                with pytest.raises(InputError, match="x is in use"), locked(file, "x", "go"):
                    pass
    finally:
        if os.getpid() != parent:  # the child, which must not go on with other tests
            os._exit(sys.exc_info()[0] is not None)
    assert not file.exists()


def test_lock_is_waited_for(holder, tmp_path, monkeypatch):
    file, said = tmp_path / "lock", []
    process, _ = holder(file)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.checkpoint.lock.say", lambda line: (said.append(line), process.kill()))
        with locked(file, "x", "go", wait_seconds=600):
            process.join()
    by = f"process {process.pid} on {HERE}"
    assert said == [f"x is in use, by {by}: waiting for at most 600 seconds"]
    process, _ = holder(file)
    began = time.monotonic()
    with pytest.raises(InputError, match="after 0.3 seconds"), locked(file, "x", "go", 0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 60


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_said_and_used(number, tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", "runs/x/sft", ""):
        said = f"the file system of runs/x/sft has no locks ({os.strerror(number)})"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_something_else_in_place_of_a_lock_is_named_and_kept(kind, tmp_path):
    file, mine = tmp_path / "lock", tmp_path / "mine"
    mine.write_text("mine")
    file.mkdir() if kind == "directory" else file.symlink_to(mine)
    with pytest.raises(InputError, match="lock is in the way of a lock file; delete it"):
        with locked(file, "x", ""):
            pass
    assert os.path.lexists(file) and mine.read_text() == "mine"


# --- Stages ---------------------------------------------------------------------------------------


def config_of(tmp_path, **values):
    return SFTStageConfig(runs_dir=str(tmp_path / "runs"), run_name="mine", **values)


def test_a_place_where_no_folder_can_be_made_is_named():
    config = SFTStageConfig(runs_dir="/proc", run_name="mine")
    with pytest.raises(InputError, match="/proc/mine.*: No such file or directory"):
        with one_writer(config, "sft"):
            pass


def test_run_that_does_not_begin_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no such data"), one_writer(config_of(tmp_path), "sft"):
        raise InputError("no such data")
    assert list(tmp_path.iterdir()) == []
    with one_writer(config_of(tmp_path, resume=True), "sft"):
        assert list(tmp_path.iterdir()) == []  # there is nothing to continue


def test_directory_that_was_replaced_while_a_run_goes_on_gets_no_checkpoint(tmp_path):
    directory = tmp_path / "runs/mine/sft"
    with one_writer(config_of(tmp_path), "sft"):
        (directory / "checkpoint-1").mkdir()
        seal(directory / "checkpoint-1", directory, facts_of_run(directory))
        shutil.rmtree(directory)
        with one_writer(config_of(tmp_path), "sft"):
            (directory / "checkpoint-1").mkdir()
        with pytest.raises(InputError, match="sft was deleted, moved or replaced during the run"):
            seal(directory / "checkpoint-1", directory, facts_of_run(directory))


@pytest.mark.parametrize(
    "stage", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "ppo"))]
)
@pytest.mark.parametrize("values", [{}, {"resume": "auto"}, {"overwrite": True}, {"resume": True}])
def test_second_start_beside_a_live_run_is_refused_and_changes_nothing(
    stage, values, holder, wholes, tmp_path
):
    plain, finished, _ = wholes(stage)
    config = new_run(plain, tmp_path, "run", **({"resume": False} | values))
    config.checkpoint = dataclasses.replace(config.checkpoint, grace_seconds=0.2)
    shutil.copytree(finished, directory_of(config))
    shutil.rmtree(directory_of(config) / "final")
    process, _ = holder(directory_of(config) / ".lock")
    before = snapshot([tmp_path])
    waited = " after 0.2 seconds .checkpoint.grace_seconds." if "auto" in values.values() else ""
    by = f"process {process.pid} on {HERE}"
    with pytest.raises(
        InputError, match=f"^{directory_of(config)} is in use{waited}, by {by}; wait"
    ):
        train(config)
    assert snapshot([tmp_path]) == before


def test_of_runs_that_start_at_once_one_trains_and_the_others_are_refused(wholes, tmp_path):
    plain, _, whole = wholes("ppo")
    config = new_run(plain, tmp_path, "run", resume=False)
    processes = [start(config) for _ in range(3)]
    for process in processes:
        process.join(300)
    assert sorted(process.exitcode for process in processes) == [0, 1, 1]
    assert outcome(config) == whole.outcome
    assert not (directory_of(config) / ".lock").exists()
    refused = [line for line in text_of(config).splitlines() if "InputError: " in line]
    assert len(refused) == 2 and all(
        " is in use, by process " in line or "already holds a finished run" in line
        for line in refused
    )


def holds(process, file) -> bool:
    """Whether a process holds a lock: the file is there a moment before it is locked."""
    return file.exists() and f"process {process.pid} on" in file.read_text()


def test_requeued_run_waits_for_the_one_before_and_continues_it(wholes, tmp_path):
    plain, _, whole = wholes("sft")
    config = new_run(plain, tmp_path, "run")
    config.checkpoint = dataclasses.replace(config.checkpoint, grace_seconds=600)
    # the first run stays in its third step until the second one has met the lock
    first = start(config, ask=signal.SIGTERM, ask_when=tmp_path / "met")
    try:
        wait_for(lambda: holds(first, directory_of(config) / ".lock"), first)
        second = start(config)
        wait_for(lambda: "waiting for at most 600 seconds" in text_of(config), second)
    finally:
        (tmp_path / "met").touch()
    for process in (first, second):
        process.join(300)
    assert (first.exitcode, second.exitcode) == (143, 0), text_of(config)[-3000:]
    assert outcome(config) == whole.outcome


def refused_rank(rank, port, config, report) -> None:
    """One of two processes of a run whose directory is locked."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    try:
        train(config)
    except InputError as error:
        report.send(str(error))


def test_all_processes_of_a_run_learn_that_its_directory_is_in_use(holder, wholes, tmp_path):
    config = new_run(wholes("ppo")[0], tmp_path, "run", resume=False)
    directory_of(config).mkdir(parents=True)
    process, _ = holder(directory_of(config) / ".lock")
    ends = [FORKS.Pipe() for _ in range(2)]
    with held_port() as port:
        ranks = [
            Fork(target=refused_rank, args=(rank, port, config, theirs))
            for rank, (_, theirs) in enumerate(ends)
        ]
        for rank in ranks:
            rank.start()
        for ours, _ in ends:
            assert ours.poll(300) and f"in use, by process {process.pid} on" in ours.recv()
        for rank in ranks:
            rank.join(300)
            assert rank.exitcode == 0


# --- Scores ---------------------------------------------------------------------------------------


def test_scores_have_one_writer(holder, tmp_path, capsys):
    from rlhf.score import main

    rows, out = tmp_path / "rows.jsonl", tmp_path / "rows.scored.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    model = write_reward_model(tmp_path / "reward", policy_tokenizer(), seed=0)
    process, _ = holder(tmp_path / ".rows.scored.jsonl.lock")
    assert main([f"data={rows}", f"path={model}"]) == 2
    line = f"error: out={out} is in use, by process {process.pid} on {HERE}; wait, or give another"
    assert line in capsys.readouterr().err
    assert not out.exists()
