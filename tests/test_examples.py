"""The examples run, and every command of the README runs on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
# What makes a README command small enough for a test; appended to each command of the stage.
SMALL = {
    "sft": "trainer.max_steps=2 num_samples=2 response_length=8 dataset.max_length=128",
    "reward": "trainer.max_steps=2 dataset.max_length=128",
    "ppo": "ppo.num_updates=2 ppo.batch_size=4 ppo.response_length=8 evaluation.num_prompts=2 "
    "checkpoint.every=1",
}
DEMO = "dataset.max_rows=64 dataset.max_eval_rows=8"


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
    tokenizer = tiny_tokenizer()
    tiny_model("gpt_neox", tokenizer).save_pretrained(folder / "pythia")
    tokenizer.save_pretrained(folder / "pythia")
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


def tiny_version(command: str) -> list[str]:
    """The command on a tiny model: the same line with small sizes appended."""
    words = shlex.split(command.replace("EleutherAI/pythia-410m", "pythia"))
    if words[0] == "accelerate":
        words[:2] = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    elif words[0] == "python":
        words[0] = sys.executable
    stage = next((s for s in SMALL if f"rlhf.{s}" in words), None)
    if stage is None or "score=answers.jsonl" in words:  # of what the stages left
        return [word.replace("checkpoint-40", "checkpoint-1") for word in words]
    if "--help" not in words and "--cfg" not in words:
        words += SMALL[stage].split()
        if "recipe=demo" in words:
            words = [w for w in words if w != "dataset.max_length=128"] + DEMO.split()
        elif "dataset=" in command:
            words += ["dataset.eval_fraction=0.3"]
    return words


def test_every_readme_command_runs(folder):
    """In the README's order and in one folder, since later commands build on earlier ones."""
    stages = [command for command in readme_commands() if "rlhf." in command]
    assert len(stages) >= 8
    for command in stages:
        if "resume=true" in command:  # resumes what an interrupted run left
            directory = folder / "runs/mine/ppo"
            (directory / "final").rename(folder / "finished")
            command += " dataset=alpaca dataset.path=train.jsonl"
        result = run(tiny_version(command), folder)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-3000:]}"
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
