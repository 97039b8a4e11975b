"""Which settings may change when a run is resumed, and which should after a non-finite number.

A run may become longer, finished or not: `resume=true` accepts new values of `LENGTH` settings, and
another URL of a scorer (`SERVED`): its server may listen elsewhere now. A run that meets a
non-finite number writes `stopped.json`. While its newest checkpoint is older than the stop,
`resume=true` accepts new values of `ADJUSTABLE` settings. `changes.jsonl` lists what changed; later
checkpoints and `rlhf.json` repeat it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from rlhf.checkpoint.ownership import STOPPED, complete_checkpoints, manifest_of, step_of
from rlhf.config import (
    CONFIG_FILE,
    InputError,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    StageConfig,
    dotted,
    is_remote,
    learning_rates,
    one_line,
    plain_values,
    resume_overrides,
    stage_command,
    written_settings,
)
from rlhf.console import is_main_process, num_processes

if TYPE_CHECKING:  # commands import this room before they need torch
    import torch

# Settings, or groups of them, that may change on resume because they do not affect the result.
HARMLESS = (
    *("runs_dir", "run_name", "distributed", "distributed_timeout", "tracker", "checkpoint"),
    *("preflight", "watchdog"),
    # rows and tokens of a forward pass: equal up to rounding
    *("micro_batch_tokens", "ppo.micro_batch_tokens", "ppo.micro_batch_size"),
    *("ppo.rollout_batch_size", "ppo.chunk_tokens"),
    *("num_samples", "response_length", "temperature", "top_p", "ppo.save_rollouts"),
    *("sampling.url", "sampling.vllm_python", "sampling.vllm_args", "sampling.weights_dir"),
    *("sampling.max_gap", "sampling.weights", "sampling.gather"),
    *("peft.save", "scorer.endpoint"),
    *("reward.num_normalization_prompts", "normalization", "trainer.dataloader_num_workers"),
)
NOT_HARMLESS = (
    "watchdog.kl_budget",  # it ends the run
    *("scorer.endpoint.model", "scorer.endpoint.max_tokens"),
)
# Settings that say when a run ends.
LENGTH = ("ppo.num_updates", "watchdog.kl_budget", "trainer.max_steps", "trainer.num_train_epochs")
# Settings that decide whether numbers overflow: they may change after a non-finite number.
ADJUSTABLE = (
    *("precision", "model.dtype", "model.attn_implementation", "trainer.fp16"),
    *("trainer.learning_rate", "trainer.warmup_steps", "trainer.max_grad_norm"),
    *("ppo.learning_rate", "critic.learning_rate", "ppo.lr_warmup_updates", "ppo.lr_warmup_start"),
    *("ppo.max_grad_norm", "ppo.adam_epsilon", "ppo.target_kl", "ppo.clip_scores"),
)
PROCESSES = "number of processes"
# May change where an optimiser step reads as many rows as before.
PER_DEVICE = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
# where URLs are: the same server may listen elsewhere
SERVED = ("scorer.path", "scorer.components", "evaluation.scorer")
FOUND = ("dataset.format",)  # settings that a stage finds if they are null
TYPED = "model.trust_remote_code"  # a person types it each time; no file can give it


def is_harmless(key: str) -> bool:
    """True for a setting that does not affect what is trained."""
    groups = tuple(f"{name}." for name in HARMLESS)
    harmless = key in (*HARMLESS, PROCESSES, *PER_DEVICE) or key.startswith(groups)
    return harmless and key not in NOT_HARMLESS


def refuse_changes(config: StageConfig, directory: Path) -> dict[str, str]:
    """Refuse a configuration with which a run would not end as if it had never stopped.

    Args:
        directory: the checkpoint where the run continues, or the `final/` of a finished run.

    Returns:
        The accepted changes: setting -> "setting: old -> new". They are harmless, in `LENGTH`,
        URLs of `SERVED`, or in `ADJUSTABLE` if the run stopped at a non-finite number after the
        checkpoint.
    """
    lines = _changed_settings(config, directory)
    is_finished = directory.name == "final"
    allowed: tuple[str, ...] = ()
    if is_finished:
        lines.pop(TYPED, None)  # it loads no model
    elif stopped_after(directory.parent, step_of(directory)) is not None:
        allowed = ADJUSTABLE
    if not is_finished and lines.keys() & set(LENGTH):
        refuse_end(config, directory)
    may_change = allowed + LENGTH + _moved(config, directory)
    refused = [
        line for key, line in lines.items() if not is_harmless(key) and key not in may_change
    ]
    processes = num_processes() if is_finished else manifest_of(directory)["processes"]
    if processes != num_processes():  # equal up to rounding
        lines[PROCESSES] = f"{PROCESSES}: {processes} -> {num_processes()}"
    batches: list[str] = []
    if not isinstance(config, PPOStageConfig):
        batches = _other_batches(lines, read_settings(directory), _plain(config), processes)
    if refused := refused + batches:
        listed = "\n  ".join(refused)
        also = f" (only {', '.join(allowed)} may change after the stop)" if allowed else ""
        alone = "" if batches else f", as {resume_overrides(config)} alone does"
        raise InputError(
            f"{directory} was written with a different configuration:\n  {listed}\n"
            "A resumed run must end as if it had never stopped: set these back to their old "
            f"values{also}{alone}, or start a new run with another run_name"
        )
    return lines


def _other_batches(
    lines: dict[str, str], was: dict[str, Any], now: dict[str, Any], processes: int
) -> list[str]:
    """What is wrong if SFT or reward goes on with other batches on each process: an optimiser step
    must read the same rows.

    Args:
        lines: what has changed.
        processes: their number before.
    """
    if not lines.keys() & {PROCESSES, *PER_DEVICE}:
        return []
    planned = now.get("reward.tokens_per_batch") is not None  # batches of unequal size
    what, setting = ("batches", PER_DEVICE[1]) if planned else ("rows", PER_DEVICE[0])
    totals = []
    for settings, number in ((was, processes), (now, num_processes())):
        size = 1 if planned else settings.get(PER_DEVICE[0], 8)  # the Trainer's own default
        each = size * settings.get(PER_DEVICE[1], 1)
        totals.append(settings.get("batch_size") or each * number)
    if totals[0] == totals[1]:
        return []
    changed = [lines[name] for name in (PROCESSES, *PER_DEVICE) if name in lines]
    others = num_processes() * (1 if planned else now.get(PER_DEVICE[1], 1))
    fits, rest = divmod(totals[0], others)
    changed += [] if rest else [f"{setting}={fits} keeps {totals[0]}"]
    return [f"{what} of an optimiser step: {totals[0]} -> {totals[1]} ({'; '.join(changed)})"]


def _moved(config: StageConfig, directory: Path) -> tuple[str, ...]:
    """The scorers that differ in the places of URLs alone."""
    was, now = read_settings(directory), _plain(config)
    return tuple(key for key in SERVED if _anywhere(was.get(key)) == _anywhere(now.get(key)))


def _anywhere(value: Any) -> Any:
    """A scorer's path, or the components of several, without the places of URLs."""
    if isinstance(value, list):
        return [part | {"path": _anywhere(part.get("path"))} for part in value]
    return "a URL" if is_remote(value) else value


def length_of(config: StageConfig) -> tuple[str, float]:
    """The setting that decides how long a run is, and its value."""
    if isinstance(config, PPOStageConfig):
        return "ppo.num_updates", config.ppo.num_updates
    trainer = cast(SFTStageConfig | RewardStageConfig, config).trainer
    if trainer.get("max_steps", -1) > 0:
        return "trainer.max_steps", trainer["max_steps"]
    return "trainer.num_train_epochs", trainer["num_train_epochs"]


def refuse_end(config: StageConfig, checkpoint: Path) -> None:
    """Refuse an end that a run has passed already, or, if it is finished, has reached."""
    (setting, end), made = length_of(config), float(step_of(checkpoint))
    if setting == "trainer.num_train_epochs":
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        made = float(state["epoch"])
    if end > made or (end == made and not (checkpoint.parent / "final").is_dir()):
        return
    unit = setting.split("_")[-1]  # updates, steps, epochs
    over = " (it replaces trainer.num_train_epochs)" if setting == "trainer.max_steps" else ""
    raise InputError(
        f"{setting}={end:g}{over}: {checkpoint.parent} has made {made:g} {unit} already; give a "
        "larger number to make the run longer, or another run_name to start a new run"
    )


def _changed_settings(config: StageConfig, directory: Path) -> dict[str, str]:
    """Compare with the configuration in a directory: setting -> "setting: old -> new"."""
    was = read_settings(directory)
    now = _plain(config)
    # a setting that an earlier version did not have
    was = {key: value for key, value in _plain(type(config)()).items() if key in now} | was
    lines = {
        key: f"{key}: {_show(was, key)} -> {_show(now, key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not (key in FOUND and now[key] is None)
    }
    if TYPED in lines:
        lines[TYPED] += f" (type {TYPED}={_show(was, TYPED)} again: no file can give permission)"
    return lines


def _plain(config: StageConfig) -> dict[str, Any]:
    return _flat(cast(dict, OmegaConf.to_container(OmegaConf.create(plain_values(config)))))


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the settings in a directory's `config.yaml`, by dotted key."""
    return _flat(written_settings(directory / CONFIG_FILE))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; paths inside the run's own folder become relative to it."""
    run = f"{Path(values['runs_dir']) / values['run_name']}/"
    return {
        key: value.removeprefix(run) if isinstance(value, str) else value
        for key, value in dotted(values).items()
        if key not in ("resume", "overwrite") and value != {}
    }


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(not set)"


# --- After a non-finite number --------------------------------------------------------------------


def write_stop(directory: Path, step: int, problem: str) -> None:
    """Note in a stage directory that optimiser step or update `step` met a non-finite number."""
    content = {"reason": "non_finite", "step": step, "problem": problem}
    (directory / STOPPED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stopped_after(directory: Path, step: int) -> int | None:
    """Return the step at which the run met a non-finite number; None if it met none, or if `step`,
    from which it continues, is later."""
    file = directory / STOPPED
    if not file.is_file():
        return None
    try:
        stop = int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (ValueError, LookupError, TypeError) as error:
        fix = "delete it, and give the run its old settings"
        raise InputError(f"{file} is damaged ({one_line(error)}); {fix}") from error
    return stop if step < stop else None


def explain_stop(
    config: StageConfig,
    directory: Path,
    error: InputError,
    step: int,
    spoilt: bool,
    dtype: torch.dtype,
) -> InputError:
    """Note that a non-finite number ends the run, and add to the error how to continue.

    Args:
        step: optimiser step or update that was not finished.
        spoilt: True if the weights after the previous step led to the number: it would come again.
    """
    import torch

    if is_main_process():
        write_stop(directory, step, str(error))
    checkpoints = complete_checkpoints(directory)
    usable = [path for path in checkpoints if step_of(path) < step - spoilt]
    if usable:
        newer = ", ".join(str(path) for path in checkpoints if path not in usable)
        delete = f"delete {newer}, whose weights led to it, then " if newer else ""
        command = stage_command(directory.name, [resume_overrides(config)], config.distributed)
        way = f"To go on from {usable[-1]}: {delete}{command}"
    else:
        way = "No checkpoint is from before: start again with the same command, overwrite=true and"
    lower = [f"{name}={rate / 10:g}" for name, rate in _learning_rates(config).items()]
    remedy = "model.dtype=float32" if dtype == torch.float16 else " ".join(lower)
    has_gpu, precision = torch.cuda.is_available(), config.precision
    mixed = precision == "bfloat16" or (precision == "auto" and has_gpu)
    also = "; precision=float32 may help too" if mixed else ""
    return InputError(f"{error}. {way} {remedy}{also}")


def _learning_rates(config: StageConfig) -> dict[str, float]:
    """Return the learning rates of a stage, cut to at most 0.01."""
    rates = learning_rates(config)
    if isinstance(config, PPOStageConfig) and not config.ppo.has_critic:
        del rates["critic.learning_rate"]
    return {name: min(rate, 1e-2) for name, rate in rates.items()}
