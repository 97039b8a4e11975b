"""One small run of each stage, which takes a second, as processes that tests kill and continue."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from helpers.processes import Fork
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
)
from rlhf.demo.world import MODEL_CONFIG
from rlhf.demo.world import rows as demo_rows
from rlhf.metrics import read_jsonl

STAGES = ("sft", "reward", "ppo")
ACCESSES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")

# --- The three runs ------------------------------------------------------------------------------


def write_data(folder: Path) -> Path:
    """Write a few rows of the demo for SFT and reward model, and prompts for PPO."""
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


def lengths(prompts, responses):
    """Score by length, without random numbers: those saved are of the first process."""
    return [len(response) / 10 for response in responses]


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
        scorer=ScorerConfig(path="python:helpers.runs.noisy_scores", normalize="none"),
        critic=CriticConfig(init="policy", learning_rate=1e-3),
        evaluation=EvaluationConfig(every=2, num_prompts=4),
        checkpoint=CheckpointConfig(every=3),
        preflight=False,
    )


def write_random_policy(directory: Path, seed: int = 0) -> Path:
    """Write a tiny random Llama whose responses end at different lengths, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer, seed)
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


def run_stage(
    config,
    log: str,
    kill_at: int,
    hang_at: int | None,
    ask: int | None,
    ask_when: Path | None = None,
) -> None:
    """Run a stage in this process; kill it at its `kill_at`-th access to a file that it writes.

    Args:
        hang_at: number of steps after which the Trainer hangs.
        ask: number of a signal that the run gets as it writes its first row of metrics.
        ask_when: a file for which that moment waits.
    """
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
            while ask_when is not None and not ask_when.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)
        if event in ACCESSES and any(str(path).startswith(directory) for path in arguments[:2]):
            accesses += 1
            if accesses == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if hang_at is not None:
        hang(hang_at)
    result = train(config)
    ask = None  # the metrics are read below, by all processes
    print(f"printed:\n{result}\nresult={result.directory}, accesses={accesses}", flush=True)
    assert result.metrics == read_jsonl(directory_of(config) / "metrics.jsonl") != []
    sys.exit(128 + result.stopped_by if result.stopped_by else 0)


def hang(step: int) -> None:
    """Have the Trainer hang before a step, and say so."""
    from rlhf.hf_trainer import training

    class Hanging(training.CheckpointCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step >= step:
                print("hanging", flush=True)
            while state.global_step >= step:
                time.sleep(0.1)

    training.CheckpointCallback = Hanging


def train(config):
    """Run the stage that a configuration is for."""
    from rlhf import train_ppo, train_reward, train_sft

    trains = {SFTStageConfig: train_sft, RewardStageConfig: train_reward, PPOStageConfig: train_ppo}
    return trains[type(config)](config)


def directory_of(config) -> Path:
    stages = {SFTStageConfig: "sft", RewardStageConfig: "reward", PPOStageConfig: "ppo"}
    return config.stage_dir(stages[type(config)])


def in_two_processes(run_rank, *arguments) -> None:
    """Call `run_rank(rank, *arguments)` in two processes, which both must succeed."""
    both = [Fork(target=run_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]


def log_of(config) -> Path:
    return Path(config.runs_dir) / f"{config.run_name}.log"


def text_of(config) -> str:
    return log_of(config).read_text() if log_of(config).exists() else ""


def names(directory: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob(pattern))


def start(
    config,
    kill_at: int = 0,
    hang_at: int | None = None,
    ask: int | None = None,
    ask_when: Path | None = None,
):
    """Start a stage as a process of its own."""
    Path(config.runs_dir).mkdir(exist_ok=True, parents=True)
    arguments = (config, str(log_of(config)), kill_at, hang_at, ask, ask_when)
    process = Fork(target=run_stage, args=arguments)
    process.start()
    return process


def finish(process, config) -> None:
    process.join(300)
    assert process.exitcode == 0, text_of(config)[-3000:]


def wait_for(condition, process) -> None:
    """Wait until a condition holds; fail where a process ends, or minutes pass, without it."""
    began = time.perf_counter()
    while True:
        alive = process.is_alive()  # before the condition, which its last act may bring about
        if condition():
            return
        assert alive and time.perf_counter() - began < 300
        time.sleep(0.005)


def outcome(config) -> dict[str, bytes]:
    """Everything that a run leaves and that does not depend on the clock."""
    directory = directory_of(config)
    files = [*sorted((directory / "final").glob("*.safetensors")), directory / "final/rlhf.json"]
    files += [f for f in sorted(directory.glob("*.jsonl")) if f.name != "timings.jsonl"]
    kept = {f"critic/{file.name}": file for file in (directory / "critic").glob("*.safetensors")}
    kept |= {file.name: file for file in files}
    return {name: file.read_bytes() for name, file in kept.items()}


def new_run(config, folder: Path, name: str, **values):
    """The same run in another folder, to be continued for as long as it is not finished."""
    values = {"runs_dir": str(folder), "run_name": name, "resume": "auto"} | values
    return dataclasses.replace(config, **values)


def uninterrupted_runs(runs: Path, data: Path, policy: Path):
    """Return a function: name of a stage -> configuration, directory and `Whole` of its run."""
    found: dict[str, tuple] = {}
    warm_up = Fork(target=os.getpid)  # the first process waits for the imports
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
