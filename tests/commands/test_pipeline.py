"""`python -m rlhf.pipeline`: which stage gets which override, what is refused before anything
starts, what is skipped, and how it ends. The stages are played by a function; `slow` runs them.

Run: python -m pytest tests/commands/test_pipeline.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf.pipeline
from rlhf.checkpoint import StageRecord, read_record
from rlhf.config import STAGES, InputError, save_config
from rlhf.option_parser import help_text, read_options, run_command
from rlhf.pipeline import PipelineOptions, owners, plan, route
from rlhf.pipeline import run as run_pipeline

ROOT = Path(__file__).resolve().parents[2]
ALL = list(STAGES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest
    # there are no rows, and results hold no weights
    monkeypatch.setattr("rlhf.inputs.check_model", lambda *_, **__: None)
    monkeypatch.setattr("rlhf.inputs.check_rows", lambda *_: None)
    return tmp_path


# --- Overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=2", {stage: "seed=2" for stage in ALL}),
        ("recipe=demo", {stage: "recipe=demo" for stage in ALL}),
        ("--config-dir=own", {stage: "--config-dir=own" for stage in ALL}),
        ("peft=lora", {stage: "peft=lora" for stage in ALL}),
        ("model.dtype=bfloat16", {stage: "model.dtype=bfloat16" for stage in ALL}),
        ("trainer.max_steps=3", {s: "trainer.max_steps=3" for s in ("sft", "reward")}),
        ("evaluation.every=5", {"ppo": "evaluation.every=5"}),
        ("sft.trainer.learning_rate=1e-5", {"sft": "trainer.learning_rate=1e-5"}),
        ("reward.dataset=ranked", {"reward": "dataset=ranked"}),
        ("+reward.trainer.x.y=1", {"reward": "+trainer.x.y=1"}),
        ("ppo.seed=2", {"ppo": "seed=2"}),
        # `ppo` and `reward` are stages and also groups of settings
        ("ppo.ppo.kl_coef=0.1", {"ppo": "ppo.kl_coef=0.1"}),
        ("ppo.num_updates=3", {"ppo": "ppo.num_updates=3"}),
        ("reward.loss=listwise", {"reward": "reward.loss=listwise"}),
        ("reward.reward.loss=listwise", {"reward": "reward.loss=listwise"}),
        ("reward.batch_size=8", {"reward": "batch_size=8"}),
        # SFT stores these with its result
        ("model.path=gpt2", {"sft": "model.path=gpt2"}),
        ("model.config.hidden_size=8", {"sft": "model.config.hidden_size=8"}),
        ("reward.model.path=gpt2", {"reward": "model.path=gpt2"}),
        ("dataset.path=a=b.jsonl", {stage: "dataset.path=a=b.jsonl" for stage in ALL}),
    ],
)
def test_an_override_goes_to_the_stages_that_it_is_for(override, expected):
    routed = route([override], ALL)
    assert routed == {stage: [expected[stage]] if stage in expected else [] for stage in ALL}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.kl_coeff=1", "no stage has the key 'ppo.kl_coeff'. Use ppo.kl_coef"),
        ("ppo.ppo.kl_coeff=1", "no stage has the key 'ppo.ppo.kl_coeff'. Use ppo.kl_coef"),
        ("poo.num_updates=4", "no stage has the key 'poo.num_updates'. Use ppo.num_upda"),
        ("sft.num_updates=4", "no stage has the key 'sft.num_updates'"),
        ("-m", "cannot read '-m'; write key=value"),
        ("--cfg=job", "cannot read '--cfg=job'; write key=value"),
    ],
)
def test_an_override_that_no_stage_knows_is_refused(override, message):
    with pytest.raises(InputError) as caught:
        route([override], ALL)
    assert message in str(caught.value)


def test_an_ambiguous_override_is_for_the_stage_and_says_so(capsys):
    keys = {"sft": {"seed"}, "ppo": {"seed", "ppo", "ppo.seed"}}
    assert owners("ppo.seed=2", keys) == (["ppo"], "seed=2")
    said = capsys.readouterr().out
    assert "ppo.seed=2 sets seed of the ppo stage; ppo.ppo.seed=2 would set ppo.seed" in said
    assert owners("ppo.ppo.seed=2", keys) == (["ppo"], "ppo.seed=2")
    assert capsys.readouterr().out == ""


def test_an_override_of_a_stage_that_is_left_out_is_named(folder, capsys):
    assert route(["sft.seed=2", "seed=3"], ["ppo"]) == {"ppo": ["seed=3"]}
    overrides = ["recipe=demo", "ppo.num_updates=2", "seed=3"]
    plan(PipelineOptions(["sft"], overrides))
    assert capsys.readouterr().out == "ppo.num_updates=2 is not used: it is for none of sft\n"


def test_a_model_goes_to_the_first_stages_when_sft_is_left_out():
    assert route(["model.path=gpt2"], ["reward"]) == {"reward": ["model.path=gpt2"]}


# --- Before anything starts -----------------------------------------------------------------------


def refusal(capfd, *arguments: str) -> str:
    status = None
    try:
        status = run_command("", PipelineOptions, run_pipeline, arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not Path("runs").exists()
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo.ppo.kl_coef=-1"], "ppo.kl_coef must be >= 0, got -1.0"),
        (["ppo.ppo.num_updates=many"], "ppo.num_updates: Value 'many' of type 'str' could not"),
        (["sft.trainer.max_steps=3", "ppo.scorer=none"], "scorer=none does not exist; choose one"),
        (["ppo.run_name=other"], "belong to one run, got runs/demo (reward), runs/other"),
        (["stages=[ppo,rewards]"], "stages must be some of sft, reward, ppo, got 'rewards'. Did"),
        (["stages=[]"], "stages is empty; leave it out to run all three"),
        (["stages=[ppo]"], "scorer.path: runs/demo/reward/final does not exist"),
    ],
)
def test_the_whole_pipeline_is_checked_before_the_first_stage(folder, capfd, arguments, message):
    assert message in refusal(capfd, "recipe=demo", *arguments)


def test_a_refusal_names_the_stage(folder, capfd):
    error = refusal(capfd, "recipe=demo", "ppo.ppo.kl_coef=-1")
    assert error.splitlines()[-1] == "the ppo stage refuses this; nothing was started"
    error = refusal(capfd)
    assert "dataset.path" in error and "the sft stage refuses this" in error


def test_later_stages_start_from_the_results_of_earlier_ones(folder):
    rows = ["dataset.path=rows.jsonl", "reward.dataset=ranked", "model.path=gpt2"]
    steps = plan(PipelineOptions(overrides=[*rows, "run_name=mine", "evaluation.num_prompts=0"]))
    assert [step.config.model.path for step in steps] == ["gpt2", *["runs/mine/sft/final"] * 2]
    assert steps[2].config.scorer.path == "runs/mine/reward/final"
    assert [step.config.dataset.format for step in steps] == [None, "ranked", None]
    assert [" ".join(step.arguments) for step in steps] == [
        "dataset.path=rows.jsonl model.path=gpt2 run_name=mine resume=auto",
        "dataset.path=rows.jsonl dataset=ranked run_name=mine resume=auto",
        "dataset.path=rows.jsonl run_name=mine evaluation.num_prompts=0 resume=auto",
    ]


def test_help_explains_the_overrides():
    text = help_text(str(rlhf.pipeline.__doc__), PipelineOptions)
    assert "`ppo.ppo.kl_coef=0.1` and `ppo.kl_coef=0.1` both set" in " ".join(text.split())
    assert "    stages  Stages to run, e.g. [reward,ppo]" in text
    options = read_options(PipelineOptions, ["stages=[reward, ppo]", "seed=1"])
    assert (options.stages, options.overrides) == (["reward", "ppo"], ["seed=1"])


# --- Running --------------------------------------------------------------------------------------


def finish(step) -> None:
    """Write what is read of the result of a stage."""
    step.final.mkdir(parents=True)
    names = ("eval_loss", "eval_accuracy", "eval_score", "eval_kl")
    record = StageRecord(step.stage, None, None, None, "", "", 0, 1, 1)
    record.metrics = dict.fromkeys(names, 0.125)
    (step.final / "rlhf.json").write_text(json.dumps(dataclasses.asdict(record)))
    save_config(step.config, step.final / "config.yaml")


@pytest.fixture
def stages(folder, monkeypatch):
    """Plays the stages: the names of those that ran; `fail` maps a stage to its exit status."""

    played = SimpleNamespace(ran=[], fail={}, steps={})

    def remembered_plan(options):
        steps = plan(options)
        played.steps = {step.stage: step for step in steps}
        return steps

    def run_stage(stage, arguments):
        played.ran.append(stage)
        assert arguments == played.steps[stage].arguments
        if stage in played.fail:
            return played.fail[stage]
        finish(played.steps[stage])
        return 0

    monkeypatch.setattr(rlhf.pipeline, "plan", remembered_plan)
    monkeypatch.setattr(rlhf.pipeline, "run_stage", run_stage)
    return played


DEMO = ["recipe=demo", "seed=3"]


def test_stages_run_in_order_and_a_table_ends_it(stages, capsys):
    assert run_pipeline(PipelineOptions(["ppo", "sft", "reward"], DEMO)) == 0
    assert stages.ran == ALL
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[-3:]]
    assert table[0] == ["sft", "eval_loss", "0.125", table[0][3], "runs/demo/sft/final"]
    assert table[1] == ["reward", "eval_accuracy", "0.125", table[1][3], "runs/demo/reward/final"]
    assert table[2][:5] == ["ppo", "eval_score", "0.125,", "eval_kl", "0.125"]


def test_a_stage_that_fails_ends_it_and_the_same_command_continues(stages, capsys):
    stages.fail = {"reward": 143}
    assert run_pipeline(PipelineOptions(overrides=DEMO)) == 143
    assert stages.ran == ["sft", "reward"]
    assert "the reward stage was stopped; the same command cont" in capsys.readouterr().err
    stages.fail = {}
    assert run_pipeline(PipelineOptions(overrides=DEMO)) == 0
    assert stages.ran == ["sft", "reward", "reward", "ppo"]
    said = capsys.readouterr().out
    assert "runs/demo/sft is finished: nothing to do" in said and "finished before" in said
    assert run_pipeline(PipelineOptions(overrides=DEMO)) == 0
    assert len(stages.ran) == 4


def test_a_finished_stage_with_other_settings_is_refused(stages, capsys):
    assert run_pipeline(PipelineOptions(["sft"], DEMO)) == 0
    with pytest.raises(SystemExit):
        run_pipeline(PipelineOptions(overrides=["recipe=demo", "seed=4"]))
    message = "written with a different configuration:\n  seed: 3 -> 4"
    assert message in capsys.readouterr().err and stages.ran == ["sft"]


def test_a_result_is_not_kept_when_what_it_started_from_is_trained_again(stages):
    assert run_pipeline(PipelineOptions(overrides=DEMO)) == 0
    message = "runs/demo/reward is finished, but it started from the sft stage, .*reward.overwrite"
    with pytest.raises(InputError, match=message):
        run_pipeline(PipelineOptions(overrides=[*DEMO, "sft.overwrite=true"]))
    steps = plan(PipelineOptions(overrides=[*DEMO, "overwrite=true"]))
    assert [step.finished for step in steps] == [False] * 3


def test_picked_stages_start_from_the_finished_ones(stages):
    assert run_pipeline(PipelineOptions(["sft"], DEMO)) == 0
    with pytest.raises(InputError, match="model.path=gpt2 is for the SFT stage, which stages lea"):
        run_pipeline(PipelineOptions(["reward", "ppo"], [*DEMO, "model.path=gpt2"]))
    assert run_pipeline(PipelineOptions(["reward", "ppo"], DEMO)) == 0
    assert stages.ran == ALL


# --- With real stages -----------------------------------------------------------------------------

TINY = (
    "recipe=demo run_name=tiny dataset.max_rows=64 dataset.max_eval_rows=16 num_samples=0 "
    "trainer.max_steps=4 reward.trainer.max_steps=60 checkpoint.every=2 ppo.num_updates=2 "
    "ppo.batch_size=16 ppo.rollout_batch_size=16 evaluation.num_prompts=16 preflight=false"
).split()


@pytest.mark.slow
def test_a_killed_pipeline_continues_with_the_same_command(tmp_path):
    command = [sys.executable, "-m", "rlhf.pipeline", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/tiny/reward/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    assert not (tmp_path / "runs/tiny/reward/final").exists()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "runs/tiny/sft is finished: nothing to do" in done.stdout
    started = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("===")]
    assert started == ["rlhf.reward", "rlhf.ppo"]
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ALL and "before" in rows[0]
    for stage in ALL:
        assert read_record(tmp_path / f"runs/tiny/{stage}/final").stage == stage
    lines = (tmp_path / "runs/tiny/reward/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 60
