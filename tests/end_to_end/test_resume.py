"""A run that was killed, however often and at whatever moment, ends as if it had never stopped.

Real processes are killed with SIGKILL: after a random time, or at a random access to a file in the
directory of the run (so while a checkpoint or `final/` is written, verified or deleted, or a row
appended). Weights, `metrics.jsonl`, `samples.jsonl` and `rlhf.json` must then be, byte for byte,
those of the run left alone. So too after SIGTERM, after Ctrl-C, and with damaged checkpoints.

Run: python -m pytest tests/end_to_end/test_resume.py, with `-m slow` for many more kills
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import (
    CheckpointConfig,
    CriticConfig,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerConfig,
    SFTStageConfig,
    save_config,
)
from rlhf.demo.world import MODEL_CONFIG
from rlhf.demo.world import rows as demo_rows
from rlhf.metrics import TIMINGS, read_jsonl

STAGES = ("sft", "reward", "ppo")
ACCESSES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
# started once, with everything imported: each run is a fork of it
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rlhf.sft.stage", "rlhf.reward.stage", "rlhf.ppo.stage"])

# --- The three runs, which take a second each -----------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a few rows of the demo for SFT and reward model, and prompts for PPO."""
    folder = tmp_path_factory.mktemp("data")
    for stage in ("sft", "reward"):
        for split, number in (("train", 40), ("eval", 8)):
            write_rows(folder / f"{stage}_{split}.jsonl", demo_rows(stage, split)[:number])
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Name a fruit {i}"} for i in range(24)])
    return folder


def write_rows(file: Path, content: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))


def sft_config(runs: Path, data: Path) -> SFTStageConfig:
    """Three epochs of five steps, without the last; logs, evaluations and checkpoints fall on
    different steps."""
    small = {"hidden_size": 32, "intermediate_size": 64, "attention_dropout": 0.2}
    config = SFTStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(
            config=MODEL_CONFIG | small, tokenizer="python:rlhf.demo.world.build_tokenizer"
        ),
        dataset=DatasetConfig(
            path=str(data / "sft_train.jsonl"),
            eval_path=str(data / "sft_eval.jsonl"),
            format="messages",
            max_length=64,
        ),
        num_samples=4,
        response_length=8,
        checkpoint=CheckpointConfig(every=4),
    )
    config.trainer |= {"max_steps": 14, "learning_rate": 3e-3}
    config.trainer |= {"logging_steps": 3, "eval_steps": 5}
    config.trainer |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return config


def reward_config(runs: Path, data: Path, source: Path) -> RewardStageConfig:
    """Ten steps on LoRA adapters with dropout."""
    config = RewardStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(path=str(source)),
        dataset=DatasetConfig(
            path=str(data / "reward_train.jsonl"),
            eval_path=str(data / "reward_eval.jsonl"),
            format="ranked",
            max_length=64,
        ),
        peft=PeftConfig(enabled=True, r=4, dropout=0.2),
        checkpoint=CheckpointConfig(every=3),
    )
    config.trainer |= {"num_train_epochs": 2, "learning_rate": 1e-2}
    config.trainer |= {"logging_steps": 2, "eval_steps": 5, "per_device_train_batch_size": 8}
    return config


def noisy_scores(prompts, responses):
    """Score by length, with noise from every global random number generator."""
    noise = random.random() + np.random.rand() + float(torch.rand(()))
    return [len(response) / 10 + noise for response in responses]


def ppo_config(runs: Path, data: Path, policy: Path) -> PPOStageConfig:
    """Seven updates; averaged weights, and the best evaluated update as the result."""
    return PPOStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(path=str(policy)),
        dataset=DatasetConfig(
            path=str(data / "prompts.jsonl"), format="prompt_completion", eval_fraction=0.3
        ),
        ppo=PPOConfig(
            num_updates=7,
            batch_size=8,
            num_mini_batches=2,
            num_ppo_epochs=2,
            response_length=8,
            learning_rate=1e-3,
            ema_decay=0.9,
            scale_scores=True,
            kl_target=1.0,
            missing_eos_penalty=None,
        ),
        scorer=ScorerConfig(path="python:test_resume.noisy_scores", normalize="none"),
        critic=CriticConfig(init="policy", learning_rate=1e-3),
        evaluation=EvaluationConfig(every=2, num_prompts=4),
        checkpoint=CheckpointConfig(every=3),
        preflight=False,
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A tiny random Llama and its tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    # many stop tokens, so that responses of the random policy end at different lengths
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 320, 10)]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# --- Processes ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Whole:
    """A run that was left alone.

    Attributes:
        seconds: how long it took.
        accesses: how often it touched a file in its directory.
    """

    outcome: dict[str, bytes]
    seconds: float
    accesses: int


def run_stage(config, log: str, kill_at: int, hang_at: int | None, ask: int | None) -> None:
    """Run a stage in this process; kill it at its `kill_at`-th access to a file that it writes.

    Args:
        hang_at: number of steps after which the Trainer hangs.
        ask: number of a signal that the run gets as it writes its first row of metrics.
    """
    gc.freeze()  # the Trainer collects garbage: half a second over all that the fork inherited
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    accesses, directory = 0, str(directory_of(config))

    def watch(event, arguments):
        nonlocal accesses, ask
        if ask is not None and event == "open" and str(arguments[0]).endswith("/metrics.jsonl"):
            number, ask = ask, None
            os.kill(os.getpid(), number)
        if event in ACCESSES and any(str(path).startswith(directory) for path in arguments[:2]):
            accesses += 1
            if accesses == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if hang_at is not None:
        hang(hang_at)
    result = train(config)
    print(f"result={result.directory}, accesses={accesses}", flush=True)
    sys.exit(128 + result.stopped_by if result.stopped_by else 0)


def hang(step: int) -> None:
    """Have the Trainer hang before a step, and say so."""
    import rlhf.hf_trainer.stage_callback

    class Hanging(rlhf.hf_trainer.stage_callback.StageCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step >= step:
                print("hanging", flush=True)
            while state.global_step >= step:
                time.sleep(0.1)

    rlhf.hf_trainer.stage_callback.StageCallback = Hanging


def train(config):
    """Run the stage that a configuration is for."""
    from rlhf.ppo import train_ppo
    from rlhf.reward import train_reward
    from rlhf.sft import train_sft

    trains = {SFTStageConfig: train_sft, RewardStageConfig: train_reward, PPOStageConfig: train_ppo}
    return trains[type(config)](config)


def directory_of(config) -> Path:
    stages = {SFTStageConfig: "sft", RewardStageConfig: "reward", PPOStageConfig: "ppo"}
    return config.stage_dir(stages[type(config)])


def log_of(config) -> Path:
    return Path(config.runs_dir) / f"{config.run_name}.log"


def text_of(config) -> str:
    return log_of(config).read_text() if log_of(config).exists() else ""


def names(directory: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob(pattern))


def start(config, kill_at: int = 0, hang_at: int | None = None, ask: int | None = None):
    """Start a stage as a process of its own."""
    Path(config.runs_dir).mkdir(exist_ok=True, parents=True)
    arguments = (config, str(log_of(config)), kill_at, hang_at, ask)
    process = PROCESSES.Process(target=run_stage, args=arguments)
    process.start()
    return process


def finish(process, config) -> None:
    process.join(120)
    assert process.exitcode == 0, text_of(config)[-3000:]


def wait_for(condition, process) -> None:
    began = time.perf_counter()
    while not condition():
        assert process.is_alive() and time.perf_counter() - began < 60
        time.sleep(0.005)


def outcome(config) -> dict[str, bytes]:
    """Everything that a run leaves and that does not depend on the clock."""
    directory = directory_of(config)
    files = [*sorted((directory / "final").glob("*.safetensors")), directory / "final/rlhf.json"]
    files += [f for f in sorted(directory.glob("*.jsonl")) if f.name != "timings.jsonl"]
    kept = {f"critic/{file.name}": file for file in (directory / "critic").glob("*.safetensors")}
    kept |= {file.name: file for file in files}
    return {name: file.read_bytes() for name, file in kept.items()}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, data, policy):
    """(configuration of a new run, the run that was left alone) for each stage, by name."""
    runs = tmp_path_factory.mktemp("whole")
    found: dict[str, tuple] = {}
    warm_up = PROCESSES.Process(target=os.getpid)  # the first process waits for the imports
    warm_up.start()
    warm_up.join()

    def get(stage: str):
        if stage not in found:
            config = {
                "sft": lambda: sft_config(runs, data),
                "reward": lambda: reward_config(runs, data, get("sft")[1] / "final"),
                "ppo": lambda: ppo_config(runs, data, policy),
            }[stage]()
            began = time.perf_counter()
            finish(start(config), config)
            seconds = time.perf_counter() - began
            accesses = int(text_of(config).split("accesses=")[-1])
            whole = Whole(outcome(config), seconds, accesses)
            found[stage] = (config, directory_of(config), whole)
        return found[stage]

    return get


def new_run(config, folder: Path, name: str, **values):
    """The same run in another folder, to be continued for as long as it is not finished."""
    values = {"runs_dir": str(folder), "run_name": name, "resume": "auto"} | values
    return dataclasses.replace(config, **values)


# --- SIGKILL --------------------------------------------------------------------------------------


def kill_and_resume(stage, wholes, folder, num_kills, seed) -> tuple[int, int]:
    """Kill runs until `num_kills` have died, each time continuing; compare all that finish.

    Returns:
        number of kills at a file, number of runs that finished.
    """
    plain, _, whole = wholes(stage)
    draw = random.Random(seed)
    kills = at_files = runs = 0
    while kills < num_kills:
        config = new_run(plain, folder, f"run-{runs}")
        finished = False
        while not finished:
            at_file = draw.random() < 0.6
            kill_at = draw.randint(1, whole.accesses) if at_file and kills < num_kills else 0
            process = start(config, kill_at)
            if kills < num_kills and not at_file:
                process.join(draw.uniform(0.2, 1.0) * whole.seconds)
                process.kill()
            process.join(120)
            killed = process.exitcode == -signal.SIGKILL
            assert killed or process.exitcode == 0, text_of(config)[-3000:]
            kills, at_files = kills + killed, at_files + (killed and kill_at > 0)
            finished = not killed
        assert outcome(config) == whole.outcome
        assert not list(directory_of(config).glob("*.tmp"))
        runs += 1
    return at_files, runs


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_as_if_they_had_never_stopped(stage, wholes, tmp_path, capsys):
    num_kills = 8
    at_files, runs = kill_and_resume(stage, wholes, tmp_path, num_kills, seed=len(stage))
    assert at_files >= 2
    with capsys.disabled():
        print(
            f"\n{stage}: {num_kills} kills survived, {at_files} of them at a file; {runs} runs "
            "ended bit-identical",
            end=" ",
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, 12])
@pytest.mark.parametrize("stage", STAGES)
def test_many_killed_runs_end_as_if_they_had_never_stopped(stage, seed, wholes, tmp_path):
    kill_and_resume(stage, wholes, tmp_path, 40, seed)


def test_metrics_hold_one_row_for_each_log_and_each_evaluation(wholes):
    rows = read_jsonl(wholes("sft")[1] / "metrics.jsonl")
    logs = [row["step"] for row in rows if "loss" in row]
    evaluations = [row["step"] for row in rows if "eval_loss" in row]
    assert (logs, evaluations) == ([3, 6, 9, 12], [5, 10, 14])
    assert len(rows) == 7 and all(row.keys().isdisjoint(TIMINGS) for row in rows)
    timings = read_jsonl(wholes("sft")[1] / "timings.jsonl")
    assert [row["step"] for row in timings] == [row["step"] for row in rows]


# --- Damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(wholes, tmp_path_factory) -> Path:
    """The folder of an SFT run that was killed in step 10, with checkpoints of steps 4 and 8."""
    config = new_run(wholes("sft")[0], tmp_path_factory.mktemp("killed"), "run")
    process = start(config, hang_at=9)
    wait_for(lambda: "hanging" in text_of(config), process)
    process.kill()
    process.join()
    return Path(config.runs_dir)


def continued(killed: Path, folder: Path, wholes, **values):
    """The configuration that continues a copy of the killed run, and the copy's directory."""
    shutil.copytree(killed / "run", folder / "run")
    config = new_run(wholes("sft")[0], folder, "run", **values)
    return config, directory_of(config)


def truncate(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.pt"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    return f"optimizer.pt has {size - 1} bytes instead of {size}"


def flip(checkpoint: Path, name: str = "model.safetensors") -> str:
    content = bytearray((checkpoint / name).read_bytes())
    content[-5] ^= 1
    (checkpoint / name).write_bytes(content)
    return f"the content of {name} has changed"


def flip_in_manifest(checkpoint: Path) -> str:
    flip(checkpoint, "manifest.json")
    return "manifest.json is damaged itself"


def remove_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json is missing: its writing was cut off"


@pytest.mark.parametrize("damage", [truncate, flip, flip_in_manifest, remove_manifest])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    problem = damage(directory / "checkpoint-8")
    finish(start(config), config)
    warning = f"{directory / 'checkpoint-8'} is damaged: {problem}"
    assert warning in text_of(config)
    assert f"{directory / 'checkpoint-4'} is used instead" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome
    assert names(directory, "checkpoint-*") == ["checkpoint-12", "checkpoint-8"]


def test_run_without_an_intact_checkpoint_starts_afresh_and_says_so(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    flip(directory / "checkpoint-4")
    shutil.rmtree(directory / "checkpoint-8")
    finish(start(config), config)
    assert "is damaged: the content of model.safetensors" in text_of(config)
    assert "no earlier one is intact" in text_of(config)
    assert "no checkpoint to resume from: starting afresh" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome


# --- Whose checkpoint, and with which configuration -----------------------------------------------


def refusal(config) -> str:
    """What a stage that must not start says."""
    process = start(config)
    process.join(120)
    assert process.exitcode == 1
    return text_of(config).split("InputError: ")[-1]


def test_changed_configuration_is_refused_and_every_change_listed(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes, seed=2)
    config.trainer = config.trainer | {"learning_rate": 1e-3, "adam_beta1": 0.8}
    config.checkpoint = dataclasses.replace(config.checkpoint, keep_last=5)
    before = names(directory, "[!.]*")
    message = refusal(config)
    for line in (
        f"{directory / 'checkpoint-8'} was written with a different configuration:",
        "  seed: 1 -> 2",
        "  trainer.adam_beta1: (not set) -> 0.8",
        "  trainer.learning_rate: 0.003 -> 0.001",
        "or start a new run with another run_name",
    ):
        assert line in message
    assert "keep_last" not in message
    assert names(directory, "[!.]*") == before


def test_harmless_changes_are_said_and_change_nothing(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    config.checkpoint = dataclasses.replace(config.checkpoint, every=5, keep_last=1)
    finish(start(config), config)
    said = "changed, without effect on what is trained: checkpoint"
    assert f"{said}.every: 4 -> 5" in text_of(config)
    assert f"{said}.keep_last: 2 -> 1" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome
    assert names(directory, "checkpoint-*") == ["checkpoint-10"]


def test_checkpoint_of_another_run_is_refused(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    (directory / "run.json").write_text('{"id": "0123", "stage": "sft"}')
    theirs = json.loads((killed / "run/sft/run.json").read_text())["id"]
    message = refusal(config)
    assert f"{directory / 'checkpoint-8'} belongs to another run (sft {theirs})" in message
    assert "than its directory (sft 0123, by run.json)" in message


def test_checkpoint_that_was_brought_alone_is_continued(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    for path in directory.iterdir():
        if path.name.endswith((".json", ".jsonl")):
            path.unlink()
    finish(start(config), config)
    ours, theirs = outcome(config), wholes("sft")[2].outcome
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert theirs["metrics.jsonl"].endswith(ours["metrics.jsonl"])
    assert "metrics.jsonl is shorter than when the checkpoint was written" in text_of(config)
    assert (directory / "run.json").read_text() == (killed / "run/sft/run.json").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_has_nothing_to_do(stage, wholes):
    config, directory, whole = wholes(stage)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    again = dataclasses.replace(config, resume="auto")
    finish(start(again), again)
    assert f"{directory} is finished: nothing to do" in text_of(config)
    assert f"\nresult={directory / 'final'}, " in text_of(config).split("nothing to do")[-1]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, number", [("sft", signal.SIGINT), ("reward", signal.SIGHUP), ("ppo", signal.SIGTERM)]
)
def test_run_that_is_asked_to_stop_saves_and_continues(stage, number, wholes, tmp_path):
    plain, _, whole = wholes(stage)
    config = new_run(plain, tmp_path, "run")
    process = start(config, ask=number)  # for PPO: in the evaluation before the first update
    process.join(120)
    assert process.exitcode == 128 + number
    assert "finishing this step, then saving a checkpoint" in text_of(config)
    assert "continue with resume=true" in text_of(config)
    assert len(names(directory_of(config), "checkpoint-*/manifest.json")) == 1
    assert not (directory_of(config) / "final").exists()
    finish(start(config), config)
    assert "resuming from" in text_of(config)
    assert outcome(config) == whole.outcome


def test_step_that_outlasts_the_grace_time_is_given_up(wholes, tmp_path):
    config = new_run(wholes("sft")[0], tmp_path, "run")
    config.checkpoint = dataclasses.replace(config.checkpoint, grace_seconds=0.2)
    process = start(config, hang_at=6)
    wait_for(lambda: "hanging" in text_of(config), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 143
    checkpoint = directory_of(config) / "checkpoint-4"
    assert f"exiting without saving; {checkpoint} remains" in text_of(config)
    assert names(directory_of(config), "checkpoint-*") == ["checkpoint-4"]
    finish(start(config), config)
    assert outcome(config) == wholes("sft")[2].outcome


@pytest.mark.parametrize("stopped_by, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_command_ends_with_the_status_of_the_signal(stopped_by, status, tmp_path, monkeypatch):
    from rlhf.cli import hydra_main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest
    monkeypatch.setattr("sys.argv", ["rlhf.sft"])
    with pytest.raises(SystemExit) as stop:
        hydra_main("sft", lambda config: stopped_by)
    assert stop.value.code == status


# --- Several processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_continue_bit_identically(stage, wholes, tmp_path):
    from test_stages import launch

    config = new_run(wholes(stage)[0], tmp_path / "runs", "run", resume=False)
    if stage == "ppo":  # without noise: the random numbers saved are those of the first process
        scorer = "def lengths(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"
        (tmp_path / "own_scorer.py").write_text(scorer)
        config.scorer = ScorerConfig("python:own_scorer.lengths", normalize="none")
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "mine.yaml"
    save_config(config, recipe)
    recipe.write_text("# @package _global_\n" + recipe.read_text())
    arguments = ["--config-dir", str(tmp_path), "recipe=mine"]
    launch(stage, arguments, tmp_path)
    whole, directory = outcome(config), directory_of(config)
    shutil.rmtree(directory / "final")
    launch(stage, [*arguments, "resume=true"], tmp_path)
    assert outcome(config) == whole
