"""What a launcher tells a process of a run.

Run: python -m pytest tests/test_launched.py
"""

import queue
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed import DistNetworkError, TCPStore

from rlhf import failures
from rlhf.config import CONF_DIR, InputError
from rlhf.failures import meeting
from rlhf.launched import leave_to_the_stage, refuse_other_ways, require_whole_group

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
TWO |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def told(file):
    """What accelerate launch tells the processes of a file."""
    given = ["--config_file", str(file), "--main_process_port", "0", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, TWO])
def test_whole_groups_are_taken(environment):
    require_whole_group(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "^RANK=1 must be .*WORLD_SIZE is 1; unset both"),
        (TWO | {"RANK": "2"}, "^RANK=2 must be .*WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two; unset"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; .*torchrun"),
        (TWO | {"RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "^OMPI_COMM_WORLD_SIZE=4: mpirun .*--nproc-per-node 4"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (TWO | {"PMI_SIZE": "2"}, None),
    ],
)
def test_half_a_group_is_refused(environment, message):
    if message is None:
        require_whole_group(environment)
        return
    with pytest.raises(InputError, match=message):
        require_whole_group(environment)


def test_a_missing_address_of_the_group_is_named():
    with pytest.raises(InputError, match="but MASTER_PORT is not set"):
        require_whole_group({name: TWO[name] for name in TWO if name != "MASTER_PORT"})


@pytest.mark.parametrize("port", ["", "0", "65536", "abc"])
def test_a_port_that_cannot_be_is_refused(port):
    message = "but MASTER_PORT is not set" if port == "" else f"^MASTER_PORT={port} must be"
    with pytest.raises(InputError, match=message):
        require_whole_group(TWO | {"MASTER_PORT": port})


def test_what_the_stage_decides_is_off_and_said(capsys, monkeypatch):
    asked = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_MIXED_PRECISION": "fp16"}
    leave_to_the_stage(asked)
    assert {*asked.values()} == {"no"}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("dynamo_backend: INDUCTOR of accelerate launch is off")
    assert second.startswith("mixed_precision: fp16 of accelerate launch is off")
    leave_to_the_stage(asked)
    assert capsys.readouterr().out == ""
    asked["ACCELERATE_MIXED_PRECISION"] = "fp16"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    leave_to_the_stage(asked)
    assert asked["ACCELERATE_MIXED_PRECISION"] == "fp16", "refused later"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  fsdp_activation_checkpointing: true\n", "checkpointing .*model.gradient_checkpointing"),
        ("parallelism_config:\n  parallelism_config_tp_size: 2\n", "^parallelism_config of"),
    ],
)
def test_what_no_stage_does_is_refused(lines, message, tmp_path):
    plain = CONF_DIR / "accelerate/fsdp2.yaml"
    own = plain.read_text()
    under = "fsdp_config:\n" if lines.startswith(" ") else "use_cpu: false\n"
    (tmp_path / "own.yaml").write_text(own.replace(under, under + lines))
    with pytest.raises(InputError, match=message):
        refuse_other_ways(told(tmp_path / "own.yaml"))
    refuse_other_ways(told(plain))


# --- Meeting the others ---------------------------------------------------------------------------


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment of a rank 1 whose rank 0 is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (TWO | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    return port


def test_a_rank_that_meets_nobody_names_the_address(second_of_two):
    expected = f"^rank 1: did not meet the others of 2 processes at 127.0.0.1:{second_of_two} "
    expected += r".*timed out.*\); start all 2 processes, with MASTER_ADDR"
    with pytest.raises(InputError, match=expected):
        with meeting(1):
            TCPStore("127.0.0.1", second_of_two, 2, False, timedelta(seconds=1))


def test_a_port_of_another_program_is_named_as_such(second_of_two, monkeypatch):
    with socket.socket() as other:
        other.bind(("", second_of_two))
        other.listen()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="^rank 0: .*EADDRINUSE.*; another program has this"):
            with meeting(1):
                TCPStore("127.0.0.1", second_of_two, 2, True, timedelta(seconds=1))


@pytest.mark.parametrize("error", [None, ZeroDivisionError, DistNetworkError])
def test_nobody_watches_those_who_have_met_or_failed(error, second_of_two, monkeypatch):
    """One who watched on would end the process in the midst of training."""
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 600)
    with suppress(ZeroDivisionError, InputError), meeting(60):
        (watch,) = (thread for thread in threading.enumerate() if thread.name == failures.MEETING)
        if error is not None:
            raise error
    watch.join(300)
    assert not watch.is_alive()


def test_other_errors_pass(second_of_two):
    with pytest.raises(ZeroDivisionError), meeting(60):
        raise ZeroDivisionError


def test_a_rank_says_for_whom_it_waits_and_ends_where_torch_does_not(
    second_of_two, monkeypatch, capfd
):
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 0.1)
    ended = queue.SimpleQueue()
    monkeypatch.setattr("os._exit", ended.put)
    with meeting(0.2):
        assert ended.get(timeout=300) == 2
    waiting, error = capfd.readouterr().err.splitlines()
    place = f"the others of 2 processes at 127.0.0.1:{second_of_two}"
    assert waiting.startswith(f"rank 1: waiting for {place}, for up to distributed_timeout=0.2 sec")
    assert error.startswith(f"error: rank 1: did not meet {place}; start all 2 processes")


def test_a_stage_that_meets_nobody_ends_in_one_line(second_of_two, tmp_path):
    command = [sys.executable, "-m", "rlhf.sft", "recipe=demo", "distributed_timeout=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: rank 1: did not meet the others of 2 processes"), last
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lone_rank_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command = [sys.executable, "-m", "rlhf.sft", "recipe=demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: rank 1: RANK=1 must be a number from 0")
    assert not list(tmp_path.rglob("*.safetensors"))
