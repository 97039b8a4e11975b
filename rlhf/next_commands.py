"""The commands that come next after a stage, ready to paste, for the names of its run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rlhf.config import (
    CONF_DIR,
    UNKNOWN,
    DatasetConfig,
    PPOStageConfig,
    SFTStageConfig,
    StageConfig,
    override,
    stage_command,
    with_default_paths,
)
from rlhf.console import say

NOT_NEEDED = ("max_rows", "max_eval_rows", "max_length", "split_long")  # of one stage's rows


def say_next(config: StageConfig) -> None:
    """Print the commands after a stage that has finished."""
    first, *commands = next_commands(config, _recipe())
    if any(UNKNOWN in command for command in commands):
        first += f"; {UNKNOWN}: as you started this stage"
    say("\n".join(["", first, *commands]))


def next_commands(config: StageConfig, recipe: str | None) -> list[str]:
    """A line that says what comes next, and a line for each command."""
    if isinstance(config, SFTStageConfig):
        final = config.stage_dir("sft") / "final"
        ranked = DatasetConfig(path="preferences.jsonl")
        lines = [
            "next: talk to it, and train a reward model on ranked answers",
            _command("chat", path=final),
            _stage_command("reward", config, recipe, ranked),
        ]
        if not _is_in(recipe, "reward"):
            lines[0] += ", or give PPO a function of yours as the reward"
            own = _stage_command("ppo", config, recipe, config.dataset)
            lines.append(f"{own} scorer.path=my_module.my_score")
        return lines
    if isinstance(config, PPOStageConfig):
        final = config.stage_dir("ppo") / "final"
        before = with_default_paths(config).model.path
        out = final.parents[1] / "answers.jsonl"
        return [
            "next: compare it with the policy before PPO, let it answer a file, or write it in "
            "half the size for servers",
            _command("chat", path=final, compare=before),
            _command("generate", path=final, prompts=_prompts(config), out=out),
            _command("export", path=final, out=final.parents[1] / "policy", dtype="bfloat16"),
        ]
    final = config.stage_dir("reward") / "final"
    return [
        "next: read the report again, or run PPO, here on the prompts of the ranked rows",
        _command("reward.report", path=final),
        _stage_command("ppo", config, recipe, config.dataset),
    ]


def _prompts(config: StageConfig) -> str:
    """The file of the stage's prompts, if it is one."""
    path = config.dataset.path
    return path if isinstance(path, str) and Path(path).is_file() else "prompts.jsonl"


def _is_in(recipe: str | None, stage: str) -> bool:
    return (CONF_DIR / f"recipe/parts/{recipe}_{stage}.yaml").is_file()


def _recipe() -> str | None:
    """The recipe on the command line, if there is one."""
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return choices.get("recipe")


def _command(name: str, **options: Any) -> str:
    given = (shlex.quote(f"{key}={value}") for key, value in options.items())
    return f"  python -m rlhf.{name} {' '.join(given)}"


def _stage_command(stage: str, config: StageConfig, recipe: str | None, data: DatasetConfig) -> str:
    """The command of a later stage of the same run; the recipe, where it has that stage, brings
    its own rows."""
    values: dict[str, Any] = {"run_name": config.run_name}
    if config.runs_dir != StageConfig.runs_dir:
        values["runs_dir"] = config.runs_dir
    if not isinstance(config, SFTStageConfig) and config.model.path is not None:
        values["model.path"] = config.model.path
    if config.model.trust_remote_code:
        values["model.trust_remote_code"] = True
    if _is_in(recipe, stage):
        values = {"recipe": recipe} | values
    else:
        defaults = vars(DatasetConfig())
        changed = {name: value for name, value in vars(data).items() if value != defaults[name]}
        columns = changed.pop("columns", {})
        values |= {f"dataset.{name}": changed[name] for name in changed if name not in NOT_NEEDED}
        values |= {f"dataset.columns.{name}": column for name, column in columns.items()}
    overrides = (override(key, value) for key, value in values.items())
    return f"  {stage_command(stage, list(overrides), config.distributed)}"
