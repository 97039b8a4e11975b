"""PPO across two hosts, which are two network namespaces with a cable between them, and one disk or
a disk each; and a worker that torchrun restarts.

Needs root, or other rights to make network namespaces; the tests are skipped without.

Run: python -m pytest tests/end_to_end/test_two_hosts.py -m slow
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import directory_of, outcome, ppo_config, train, write_random_policy, write_rows
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf.config import ScorerConfig, save_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HOSTS = {f"rlhf{os.getpid()}{letter}": f"10.99.0.{i}" for i, letter in enumerate("ab", 1)}
FIRST = "10.99.0.1"
# Scores by length. In its third update, the first process cuts the cable, or dies, once.
SCORER = """
import os, pathlib, signal, subprocess

calls = 0

def score(prompts, responses):
    global calls
    calls += 1
    todo = pathlib.Path(__file__).with_name("todo")
    if calls == 3 and os.environ.get("RANK") == "1" and todo.exists():
        what = todo.read_text()
        todo.unlink()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.run(["ip", "link", "set", "cable", "down"], check=True)
    return [len(response) / 10 for response in responses]
"""
RUN = """
import sys
from rlhf.cli import run_to_exit
from rlhf.config import PPOStageConfig, load_config
from rlhf import train_ppo

run_to_exit(lambda config: train_ppo(config).stopped_by, load_config(PPOStageConfig, sys.argv[1]))
"""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to make network namespaces: {done.stderr.strip()}")


@pytest.fixture
def hosts():
    """Two hosts, `HOSTS`, whose network devices are called "cable"."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command to make network namespaces with")
    a, b = HOSTS
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "cable", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def config_in(folder: Path):
    """Four updates, the best evaluated one as the result."""
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Name a fruit {i}"} for i in range(24)])
    (folder / "my_scorer.py").write_text(SCORER)
    (folder / "run.py").write_text(RUN)
    config = ppo_config(folder / "one", folder, write_random_policy(folder / "policy"))
    config.scorer = ScorerConfig("python:my_scorer.score", normalize="none")
    config.ppo.num_updates, config.ppo.num_ppo_epochs = 4, 1
    config.evaluation.num_prompts, config.checkpoint.every = 0, 1
    config.distributed_timeout = 15
    return config


def start(folder: Path, config, launcher: list[str], prefix=(), **variables: str):
    """Start a launcher in a folder; it starts `run.py` with the configuration."""
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    path = f"{ROOT}:{folder.parent}"
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *launcher, str(folder.parent / "run.py"), "config.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def on_two_hosts(folder: Path, config, disk: Path | None = None) -> tuple[list[int], list[str]]:
    """Run on both hosts; return exit codes, and what was printed.

    Args:
        disk: a folder where each host finds a disk of its own: `<disk>-0` and `<disk>-1`.
    """
    launches = []
    for rank, host in enumerate(HOSTS):
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        launcher += ["--num_processes", "2", "--machine_rank", str(rank), "--mixed_precision", "no"]
        launcher += ["--main_process_ip", FIRST, "--main_process_port", "29511"]
        prefix = ["ip", "netns", "exec", host]  # in a mount namespace of its own
        if disk is not None:
            mount = f'mount --bind {disk}-{rank} {disk} && exec "$@"'
            prefix += ["sh", "-c", mount, "sh"]
        variables = {"GLOO_SOCKET_IFNAME": "cable"}
        launches.append(start(folder / f"host-{rank}", config, launcher, prefix, **variables))
    texts = [launch.communicate(timeout=300)[0] for launch in launches]
    return [launch.returncode for launch in launches], texts


def assert_close_results(one, two) -> None:
    for name in ("final/model.safetensors", "critic/model.safetensors"):
        first, second = (load_file(directory / name) for directory in (one, two))
        for key in first:
            assert_close(second[key], first[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("disks", ["one disk", "a disk each"])
def test_two_hosts_end_when_the_cable_is_cut_go_on_and_give_the_result_of_one(
    disks, hosts, tmp_path, monkeypatch
):
    config = config_in(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    train(config)
    one, two = directory_of(config), tmp_path / "two"
    config.runs_dir, config.resume, disk = str(two), "auto", None
    if disks == "a disk each":
        disk, two = two, tmp_path / "two-0"
        for name in ("two", "two-0", "two-1"):
            (tmp_path / name).mkdir()
    (tmp_path / "todo").write_text("cut")
    codes, texts = on_two_hosts(tmp_path, config, disk)
    assert 0 not in codes, texts
    assert "error: no word from rank 1: killed (main memory may have run out)" in texts[0]
    assert "; rank 0 (scoring, update 3): " in texts[0], texts[0]
    assert "error: no word from rank 0: killed" in texts[1], texts[1]
    assert "; rank 1 (scoring, update 3): " in texts[1], texts[1]

    ip("-n", list(HOSTS)[1], "link", "set", "cable", "up")
    codes, texts = on_two_hosts(tmp_path, config, disk)
    assert codes == [0, 0], texts
    assert "resuming from" in texts[0] and "checkpoint-2" in texts[0]
    assert ("is not on all hosts: sending" in texts[0]) is (disk is not None), texts[0]
    assert_close_results(one, two / directory_of(config).relative_to(config.runs_dir))


def test_worker_that_torchrun_restarts_after_sigkill_ends_bit_identically(tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    config = config_in(tmp_path)
    config.resume, results = "auto", []
    for todo in ("", "die"):
        config.runs_dir = str(tmp_path / f"runs{todo}")
        (tmp_path / "todo").write_text(todo) if todo else None
        # else torchrun gives the new processes the addresses of the old ones (PyTorch 135712)
        own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launch = start(tmp_path / "launch", config, launcher, **own_store)
        text = launch.communicate(timeout=300)[0]
        assert launch.returncode == 0, text
        results.append(outcome(config))
    assert "resuming from" in text and f"exitcode: {-signal.SIGKILL}" in text, text
    assert results[0] == results[1]
