"""Run SFT, reward model and PPO in order: python -m rlhf.pipeline recipe=tldr model.path=gpt2

Each stage runs as `python -m rlhf.<stage>` in a process of its own. The configurations of all
stages are checked before the first one starts. Finished stages are skipped, and a stopped command
continues when it is given again. A table of the results ends it.

An override that starts with a stage goes to that stage: `sft.trainer.learning_rate=1e-5`,
`reward.dataset.path=ranked.jsonl`, `ppo.seed=2`. The first word is a stage only if the rest is a
key of that stage: `ppo.ppo.kl_coef=0.1` and `ppo.kl_coef=0.1` both set `ppo.kl_coef` of PPO.

Every other override goes to all stages that have its key: `seed=2` goes to all three,
`evaluation.every=5` to PPO. One exception: settings of the model that SFT stores with its result,
such as `model.path`, go to SFT alone, because the later stages start from that result. To set them
for a later stage, name it: `reward.model.path=gpt2`.

Left out: several processes per stage (`accelerate launch -m rlhf.<stage>` starts those).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.checkpoint import finished_run
from rlhf.cli import hydra_main
from rlhf.config import STAGES, InputError, StageConfig, config_keys, nearest, suggest
from rlhf.console import say, table
from rlhf.option_parser import run_command

# settings of the model that SFT stores with its result: the later stages read them there
STORED = {
    f"model.{name}"
    for name in "path revision config tokenizer chat_template stop_strings special_tokens "
    "eos_token pad_token shrink_embeddings".split()
}
FREE = ("trainer.", "model.config.")  # mappings whose keys belong to libraries
HEADLINES = {
    "sft": ("eval_loss", "eval_mean_token_accuracy"),
    "reward": ("eval_accuracy", "eval_longer_wins_accuracy"),
    "ppo": ("eval_score", "eval_kl", "eval_win_rate"),
}


@dataclass
class PipelineOptions:
    """The command line."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Stages to run, e.g. [reward,ppo] (default: all three)."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the stages, as above; --config-dir=<folder> goes to every stage."""


@dataclass
class Step:
    """One stage of the pipeline: its arguments, the configuration they compose, its state."""

    stage: str
    arguments: list[str]
    config: StageConfig
    finished: bool

    @property
    def final(self) -> Path:
        return self.config.stage_dir(self.stage) / "final"


def run(options: PipelineOptions) -> int:
    """Run the stages; return the exit status of the first that failed, or 0."""
    steps = plan(options)
    seconds: dict[str, float] = {}
    for step in steps:
        if step.finished:
            continue
        began = time.perf_counter()
        if status := run_stage(step.stage, step.arguments):
            ended = "was stopped" if status > 128 else f"failed with status {status}"
            text = f"the {step.stage} stage {ended}; the same command continues the pipeline"
            print(text, file=sys.stderr)
            return status
        seconds[step.stage] = time.perf_counter() - began
    say(result_table(steps, seconds))
    return 0


# --- Before the first stage starts --------------------------------------------------------------


def plan(options: PipelineOptions) -> list[Step]:
    """Check the whole pipeline: overrides, the configuration of each stage, finished stages.

    Raises:
        InputError: an unknown stage or override, or stages that do not fit together.
        SystemExit: a stage refuses its configuration; the message is printed.
    """
    for name in options.stages:
        if name not in STAGES:
            raise InputError(
                f"stages must be some of {', '.join(STAGES)}, got {name!r}.{nearest(name, STAGES)}"
            )
    picked = [stage for stage in STAGES if stage in options.stages]
    if not picked:
        raise InputError("stages is empty; leave it out to run all three")
    arguments = route(options.overrides, picked)
    for override in options.overrides:
        if not any(route([override], picked).values()):
            say(f"{override} is not used: it is for none of {', '.join(picked)}")
    steps: list[Step] = []
    for stage, mine in arguments.items():
        if not any(a.startswith(("resume=", "overwrite=")) for a in mine):
            mine.append("resume=auto")
        config = compose(stage, mine, [step.stage for step in steps])
        is_finished = False
        if (config.stage_dir(stage) / "final").is_dir():
            is_finished = finished_run(config, stage) is not None
        if is_finished:
            say(f"{config.stage_dir(stage)} is finished: nothing to do")
        steps.append(Step(stage, mine, config, is_finished))
    check_together(steps, options.overrides)
    return steps


def route(overrides: list[str], picked: Collection[str]) -> dict[str, list[str]]:
    """Give each override to its stages, without the name of a stage in front.

    An override that only other stages than the `picked` ones have goes nowhere.
    """
    keys = {stage: {"recipe", *config_keys(STAGES[stage])} for stage in STAGES}
    arguments: dict[str, list[str]] = {stage: [] for stage in picked}
    for override in overrides:
        stages, argument = owners(override, keys)
        if is_stored(argument) and len(stages) > 1 and "sft" in picked:
            stages = ["sft"]
        for stage in arguments.keys() & set(stages):
            arguments[stage].append(argument)
    return arguments


def owners(override: str, keys: Mapping[str, Collection[str]]) -> tuple[list[str], str]:
    """The stages that an override goes to, and the override as they read it."""
    if override.startswith("--config-dir="):
        return list(keys), override
    match = re.fullmatch(r"([+~]*)([\w.]+)((@|=).*)?", override, re.DOTALL)
    if match is None:
        raise InputError(f"cannot read {override!r}; write key=value (--help says more)")
    sign, key, value = match[1], match[2], match[3] or ""
    first, _, inner = key.partition(".")
    general = [stage for stage in keys if _has(keys[stage], key)]
    if first not in keys or not _has(keys[first], inner):
        if general:
            return general, override
        known = {full for stage in keys for k in keys[stage] for full in (k, f"{stage}.{k}")}
        raise InputError(f"no stage has the key {key!r}.{suggest(key, known)} Nothing was started")
    if general:
        say(
            f"{override} sets {inner} of the {first} stage; {general[0]}.{key}{value} would set "
            f"{key} of the {general[0]} stage"
        )
    return [first], f"{sign}{inner}{value}"


def is_stored(override: str) -> bool:
    """Whether an override is a setting of the model that SFT stores with its result."""
    key = re.split("[=@]", override.lstrip("+~"))[0]
    return key in STORED or key.startswith("model.config.")


def _has(keys: Collection[str], key: str) -> bool:
    return key in keys or any(key.startswith(free) and free[:-1] in keys for free in FREE)


def compose(stage: str, arguments: list[str], earlier: Collection[str]) -> StageConfig:
    """Compose and check the configuration of a stage as its command does.

    The `earlier` stages of this pipeline count as finished.

    Raises:
        SystemExit: the configuration is wrong; the message is printed.
    """
    composed: list[StageConfig] = []
    before = sys.argv
    sys.argv = [f"rlhf.{stage}", *arguments]
    try:
        hydra_main(stage, composed.append, earlier)
    except SystemExit:
        print(f"the {stage} stage refuses this; nothing was started", file=sys.stderr)
        raise
    finally:
        sys.argv = before
    return composed[0]


def check_together(steps: list[Step], overrides: list[str]) -> None:
    """Check that all stages belong to one run, and that what each starts from will not change."""
    runs = {str(step.final.parents[1]): step.stage for step in steps}
    if len(runs) > 1:
        named = ", ".join(f"{run} ({stage})" for run, stage in runs.items())
        raise InputError(f"all stages must belong to one run, got {named}; give one run_name")
    sft = steps[0].config.stage_dir("sft") / "final"
    stored = [override for override in overrides if is_stored(override)]
    if stored and steps[0].stage != "sft" and sft.is_dir():
        raise InputError(
            f"{stored[0]} is for the SFT stage, which stages leaves out; remove it to start from "
            f"{sft}, or name the stage that it is for: {steps[0].stage}.{stored[0]}"
        )
    for number, step in enumerate(steps):
        inputs = [step.config.model.path, getattr(step.config, "scorer", step.config.model).path]
        for before in steps[:number]:
            if step.finished and not before.finished and str(before.final) in inputs:
                raise InputError(
                    f"{step.final.parent} is finished, but it started from the {before.stage} "
                    f"stage, which will be trained now; add {step.stage}.overwrite=true to train "
                    "it again, or give another run_name"
                )


# --- One stage ----------------------------------------------------------------------------------


def run_stage(stage: str, arguments: list[str]) -> int:
    """Run `python -m rlhf.<stage>`; return its exit status, 128 + signal if one ended it."""
    print(f"\n=== python -m rlhf.{stage} {shlex.join(arguments)}", flush=True)
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        if process is not None:
            process.terminate()

    # We pass these two on; the stage then saves.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in numbers}
    command = [sys.executable, "-m", f"rlhf.{stage}", *arguments]
    try:
        process = subprocess.Popen(command, preexec_fn=_ends_with(os.getpid()))
        if asked:
            process.terminate()
        while process.returncode is None:
            with suppress(KeyboardInterrupt):  # the terminal sends Ctrl-C to the stage too
                process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    status = process.returncode
    if status == 0 and asked:  # the stage had ended, but the next one must not start
        return 128 + asked[0]
    return status if status >= 0 else 128 - status


def _ends_with(parent: int) -> Callable[[], None] | None:
    """Return what a stage calls as it begins, so that it is asked to stop when `parent` is killed.
    Only Linux has this; elsewhere the stage runs to its end."""
    if sys.platform != "linux":
        return None
    libc, set_death_signal = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG

    def begin() -> None:
        libc.prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before
            os.kill(os.getpid(), signal.SIGTERM)

    return begin


# --- The result ---------------------------------------------------------------------------------


def result_table(steps: list[Step], seconds: Mapping[str, float]) -> str:
    """One row per stage: its main metrics on held-out data, its seconds, and its directory."""
    rows = []
    for step in steps:
        metrics = json.loads((step.final / "rlhf.json").read_text(encoding="utf-8"))["metrics"]
        names = [name for name in HEADLINES[step.stage] if name in metrics]
        result = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
        clock = f"{seconds[step.stage]:.0f}" if step.stage in seconds else "finished before"
        rows.append((step.stage, result, clock, str(step.final)))
    return "\n" + table(rows, ("stage", "result on held-out data", "seconds", "directory"))


if __name__ == "__main__":
    again = "interrupted; the same command continues"
    raise SystemExit(run_command(str(__doc__), PipelineOptions, run, sys.argv[1:], again))
