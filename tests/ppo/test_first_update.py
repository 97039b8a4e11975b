"""The numbers of a first PPO update, as `docs/ppo-first-update.md` documents them.

Run: python -m pytest tests/ppo/test_first_update.py -m ''
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_ppo import make_config

from rlhf import train_ppo
from rlhf.metrics import read_jsonl

PAGE = Path(__file__).parents[2] / "docs/ppo-first-update.md"


def second_pass(metrics):
    """Statistics of the second of two passes; the first one has KL 0 and ratio 1 exactly."""
    assert metrics["first_ratio_deviation"] == 0.0
    return {
        "approx_kl": 2 * metrics["approx_kl"],
        "clip_fraction": 2 * metrics["clip_fraction"],
        "ratio": 2 * metrics["ratio"] - 1,
    }


def first_update(directory):
    return next(row for row in read_jsonl(directory / "metrics.jsonl") if "approx_kl" in row)


def test_adams_epsilon_as_tensorflow_adds_it_makes_a_smaller_first_step(policy_dir, tmp_path):
    seen = {}
    for epsilon in (1e-5, 3.16e-4):
        knobs = {"num_updates": 1, "num_ppo_epochs": 2, "num_mini_batches": 1, "batch_size": 16}
        config = make_config(
            policy_dir, tmp_path, **knobs, learning_rate=1e-4, adam_epsilon=epsilon
        )
        config.run_name, config.evaluation.num_prompts = f"epsilon{epsilon}", 0
        train_ppo(config)
        seen[epsilon] = second_pass(first_update(config.stage_dir("ppo")))
    assert 0 < seen[3.16e-4]["approx_kl"] < seen[1e-5]["approx_kl"]


def documented(row, column):
    """(low, high) of a cell such as "0.0048 to 0.0100" in the page's table."""
    line = next(text for text in PAGE.read_text().splitlines() if text.startswith(f"| {row}"))
    low, _, high = line.split("|")[column].strip().partition(" to ")
    return float(low), float(high)


@pytest.mark.slow
def test_the_pages_own_commands_give_its_numbers(tmp_path):
    block = re.search(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    for line in block.strip().splitlines():
        command = [sys.executable, *line.split()[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    found = second_pass(first_update(tmp_path / "runs/first/ppo"))
    at_3e4 = 6  # column of the table
    for row, name in (
        ("approx_kl, ours", "approx_kl"),
        ("clip fraction", "clip_fraction"),
        ("mean ratio", "ratio"),
    ):
        low, high = documented(row, at_3e4)
        slack = 0.25 * (high - low)  # rounding differs between machines, and training amplifies it
        assert low - slack <= found[name] <= high + slack, (name, found[name], (low, high))
