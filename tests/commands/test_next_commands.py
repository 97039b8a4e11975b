"""The commands that a stage names at its end."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.chat import ChatOptions
from rlhf.config import (
    UNKNOWN,
    DatasetConfig,
    InputError,
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    StageConfig,
    check,
)
from rlhf.distributed import launch_environment
from rlhf.export import ExportOptions
from rlhf.generate import GenerateOptions
from rlhf.next_commands import next_commands, say_next
from rlhf.option_parser import read_options
from rlhf.ppo.preflight.findings import FAIL, Finding, mended_command
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


# --- As this stage was started --------------------------------------------------------------------

ONE_HOST = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
CHOICES = StageConfig.__dataclass_fields__["distributed"].metadata["limits"].choices


def next_under(environment, monkeypatch, capsys, distributed=None):
    """What a reward stage prints at its end: what comes next, and the start of PPO's command."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say_next(RewardStageConfig(run_name="mine", distributed=distributed))
    first, report, ppo = capsys.readouterr().out.splitlines()[1:]
    assert report == "  python -m rlhf.reward.report path=runs/mine/reward/final"
    return first, ppo.strip()


@pytest.mark.parametrize("name", filter(None, CHOICES))
def test_what_a_launch_file_asks_for_is_what_torchrun_is_asked_for(name, monkeypatch, capsys):
    told = launch_environment(name)
    first, ppo = next_under(ONE_HOST | told, monkeypatch, capsys)
    ends = f"run_name=mine distributed={name}"
    assert ppo == f"torchrun --nproc-per-node 2 -m rlhf.ppo {ends}"
    assert UNKNOWN not in first
    assert next_under({}, monkeypatch, capsys, name)[1] == ppo, "named once"


def test_processes_that_share_whole_models_and_one_process(monkeypatch, capsys):
    assert next_under({}, monkeypatch, capsys)[1] == "python -m rlhf.ppo run_name=mine"
    _, ppo = next_under(ONE_HOST, monkeypatch, capsys)
    assert ppo == "torchrun --nproc-per-node 2 -m rlhf.ppo run_name=mine"


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"} | FSDP,  # two hosts
        {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "8"},
        ONE_HOST | ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        ZERO,  # one process
    ],
)
def test_a_launcher_that_cannot_be_known_is_left_to_the_user(environment, monkeypatch, capsys):
    first, ppo = next_under(environment, monkeypatch, capsys)
    assert first.endswith(f"; {UNKNOWN}: as you started this stage")
    assert ppo == f"{UNKNOWN} -m rlhf.ppo run_name=mine"


def test_an_earlier_stage_and_a_mended_preflight_start_as_this_stage_does(monkeypatch):
    for name, value in (ONE_HOST | FSDP).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="`torchrun --nproc-per-node 2 -m rlhf.sft run_name=new"):
        check(RewardStageConfig(run_name="new", dataset=DATA))
    given = ["rlhf/ppo/__main__.py", "run_name=a b", "distributed=fsdp2", "ppo.top_k=1"]
    monkeypatch.setattr("sys.argv", given)
    command = mended_command([Finding("samples", FAIL, "bad", override="ppo.top_k=0")])
    start = "torchrun --nproc-per-node 2 -m rlhf.ppo"
    assert command == f"{start} 'run_name=a b' distributed=fsdp2 ppo.top_k=0"
