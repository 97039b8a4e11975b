"""The commands that a stage names at its end."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.chat import ChatOptions
from rlhf.config import (
    DatasetConfig,
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    StageConfig,
)
from rlhf.export import ExportOptions
from rlhf.generate import GenerateOptions
from rlhf.next_commands import next_commands
from rlhf.option_parser import read_options
from rlhf.reward.report.__main__ import ReportOptions

DATA = DatasetConfig(
    path="my rows, 2.jsonl", format="alpaca", max_rows=9, columns={"instruction": "a.b"}
)
ROWS = {
    "dataset.path": "my rows, 2.jsonl",
    "dataset.format": "alpaca",
    "dataset.columns.instruction": "a.b",
}


def commands(config, recipe=None):
    """Name of each command -> its arguments as a shell passes them on."""
    lines = [shlex.split(line) for line in next_commands(config, recipe)[1:]]
    assert all(words[:2] == ["python", "-m"] for words in lines)
    return {words[2]: words[3:] for words in lines}


def overrides(arguments):
    """Key -> value, as Hydra reads the arguments."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    return {override.key_or_group: override.value() for override in parsed}


def test_after_sft_come_chat_reward_and_ppo_with_its_names_and_rows(tmp_path):
    config = SFTStageConfig(run_name="mine", runs_dir=str(tmp_path), dataset=DATA)
    found, run = commands(config), {"run_name": "mine", "runs_dir": str(tmp_path)}
    options = read_options(ChatOptions, found["rlhf.chat"])
    assert options.path == [str(tmp_path / "mine/sft/final")]
    assert overrides(found["rlhf.reward"]) == run | {"dataset.path": "preferences.jsonl"}
    own = {"scorer.path": "my_module.my_score"}
    assert overrides(found["rlhf.ppo"]) == run | ROWS | own


def test_after_the_reward_model_come_its_report_and_ppo_on_its_prompts():
    source = ModelConfig(path="other/sft/final", trust_remote_code=True)
    config = RewardStageConfig(run_name="a b", model=source, dataset=DATA)
    found = commands(config)
    assert read_options(ReportOptions, found["rlhf.reward.report"]).path == "runs/a b/reward/final"
    assert (
        overrides(found["rlhf.ppo"])
        == {"run_name": "a b", "model.path": "other/sft/final", "model.trust_remote_code": True}
        | ROWS
    )


def test_after_ppo_come_a_comparison_with_the_policy_before_and_an_export(tmp_path):
    (tmp_path / "mine/sft/final").mkdir(parents=True)
    found = commands(PPOStageConfig(run_name="mine", runs_dir=str(tmp_path)))
    chat = read_options(ChatOptions, found["rlhf.chat"])
    run = tmp_path / "mine"
    assert (chat.path, chat.compare) == ([str(run / "ppo/final")], str(run / "sft/final"))
    answers = read_options(GenerateOptions, found["rlhf.generate"])
    assert (answers.path, answers.out) == (str(run / "ppo/final"), str(run / "answers.jsonl"))
    export = read_options(ExportOptions, found["rlhf.export"])
    assert (export.path, export.out) == (str(run / "ppo/final"), str(run / "policy"))


@pytest.mark.parametrize("config", [SFTStageConfig(), RewardStageConfig()])
def test_a_recipe_brings_the_rows_of_the_next_stage(config: StageConfig):
    config.run_name = "demo"
    config.dataset.path = "python:rlhf.demo.world.rows"
    found = commands(config, "demo")
    later = "rlhf.reward" if isinstance(config, SFTStageConfig) else "rlhf.ppo"
    assert found[later] == ["recipe=demo", "run_name=demo"]
    assert ("rlhf.ppo" in found) == (later == "rlhf.ppo")
    assert "recipe=dolly_v1" not in str(commands(config, "dolly_v1"))  # it has SFT only
