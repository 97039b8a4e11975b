"""The examples run, and every command of the README runs on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
# What makes the README's commands small enough for a test: values in a copy of conf/.
DATASET = {"max_length": 128, "max_rows": 64, "max_eval_rows": 8, "eval_fraction": 0.3}
SMALL = {
    "sft": {"num_samples": 2, "response_length": 8, "trainer": {"max_steps": 2}},
    "reward": {"normalization": {"response_length": 8}, "trainer": {"max_steps": 2}},
    "ppo": {
        "ppo": {"num_updates": 41, "batch_size": 4, "num_ppo_epochs": 1, "response_length": 8},
        "evaluation": {"num_prompts": 2},
    },
}


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command as a user would, on one thread."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command,
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def readme_commands() -> list[str]:
    """The lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with the README's files, and a tiny model in place of the Hub's."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer, model = tiny_tokenizer(), folder / "EleutherAI/pythia-410m"
    tiny_model("gpt_neox", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = ["apple", "river", "stone", "cloud"]
    rows = [
        {"instruction": f"Name {i} {words[i % 4]}", "input": "", "output": f"{words[i % 4]} {i}."}
        for i in range(40)
    ]
    ranked = [
        {"prompt": row["instruction"], "responses": [row["output"], "no"], "scores": [1.0, 0.0]}
        for row in rows
    ]
    answers = [{"prompt": row["instruction"], "response": row["output"]} for row in rows[:3]]
    for name, content in (("train", rows), ("ranked", ranked), ("answers", answers)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, str]:
    """Environment of a machine on which the package has the values of `SMALL`, `python` is this one
    and `accelerate` takes a port that is free."""
    package, commands = (tmp_path_factory.mktemp(name) for name in ("package", "bin"))
    for name in ("rlhf", "conf"):
        shutil.copytree(ROOT / name, package / name)
    for name, values in SMALL.items():
        file = package / f"conf/{name}.yaml"
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), values, {"dataset": DATASET}), file)
    launch = f'exec {sys.executable} -m accelerate.commands.launch --main_process_port 0 "${{@:2}}"'
    (commands / "accelerate").write_text(f"#!/usr/bin/env bash\n{launch}\n")
    (commands / "accelerate").chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "PYTHONPATH": str(package)}


def test_every_readme_command_runs(folder, machine):
    """Unchanged, in the README's order and in one folder: later ones build on earlier ones."""
    stages = [command for command in readme_commands() if "rlhf." in command]
    assert len(stages) >= 8
    for command in stages:
        if "resume=true" in command:  # as after a kill before the end
            (folder / "runs/mine/ppo/final").rename(folder / "finished")
        result = run(["bash", "-c", command], folder, **machine)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-3000:]}"
        if "resume=true" in command:
            assert "resuming from runs/mine/ppo/checkpoint-40" in result.stdout
    assert (folder / "runs/mine/ppo/final/model.safetensors").is_file()
    assert (folder / "runs/two/sft/final/model.safetensors").is_file()


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "lint", "test-slow"} <= targets
    for target in targets:
        assert run(["make", "-n", target], ROOT).returncode == 0, target


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("examples/*.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_tests_named_in_a_page_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:rlhf|conf|examples|tests)/[\w/.]*\w)/?`", text):
        assert (ROOT / path).exists(), path
    defined = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in defined, name


def test_library_use_runs_and_is_short(tmp_path):
    script = ROOT / "examples/library_use.py"
    assert len(script.read_text().splitlines()) < 60
    result = run([sys.executable, str(script), str(tmp_path)], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = re.search(r"thanks: ([\d.]+) before, ([\d.]+) after", result.stdout).groups()
    assert float(after) > float(before) + 0.15


def test_alpaca_eval_example_runs(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    for split in ("train", "test"):
        for kind, count in (("sft", 100), ("ranked", 8)):
            name = f"alpaca_eval_{kind}_{split}.jsonl"
            lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / name).write_text("".join(lines[:count]), encoding="utf-8")
    result = run(
        ["bash", "examples/alpaca_eval/run.sh"],
        ROOT,
        DATA=str(tmp_path),
        PYTHON=sys.executable,
        RUNS=str(tmp_path / "runs"),
        SFT="trainer.max_steps=2 num_samples=2 response_length=8",
        REWARD="trainer.max_steps=2",
        PPO="ppo.num_updates=1 ppo.batch_size=4 ppo.response_length=8 evaluation.num_prompts=2",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert (tmp_path / "runs/alpaca_eval/ppo/final/model.safetensors").is_file()
