"""Configuration of the three stages: a dataclass per stage, and its checks.

The dataclasses hold every default; `conf/*.yaml` shows common knobs with their comments, and a test
keeps the two equal. Library users build a dataclass; only `rlhf.command_line` knows Hydra. What the
mapping `trainer:` may hold is decided by the libraries that receive it (see `build_arguments`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

_HERE = Path(__file__).resolve().parent
CONF_DIR = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class InputError(ValueError):
    """Bad input from the user; the message: what was given, what was expected, how to fix it."""


@dataclass
class ModelConfig:
    """Which model to start from, and how it is loaded."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Which rows to read, and which function makes them canonical."""

    path: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    format: str = "messages"
    as_conversation: bool = False
    eval_fraction: float = 0.05
    max_rows: int | None = None
    max_eval_rows: int | None = None
    max_length: int = 1024


@dataclass
class PeftConfig:
    """LoRA adapters instead of full fine-tuning."""

    enabled: bool = False
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | None = None


@dataclass
class TrackerConfig:
    """Where metrics go beside `metrics.jsonl`."""

    name: str = "none"
    project: str = "rlhf"
    entity: str | None = None
    mode: str | None = None


@dataclass
class StageConfig:
    """What the three stages have in common."""

    run_name: str = "run"
    runs_dir: str = "runs"
    seed: int = 1
    resume: bool = False
    overwrite: bool = False
    precision: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def stage_dir(self, stage: str) -> Path:
        """Directory of `stage` in this run: `runs_dir/run_name/stage`."""
        return Path(self.runs_dir) / self.run_name / stage


@dataclass
class SFTStageConfig(StageConfig):
    """`python -m rlhf.sft`."""

    train_on_prompt: bool = False
    num_samples: int = 32
    response_length: int = 128
    temperature: float = 1.0
    trainer: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 3,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "packing": False,
            "logging_steps": 10,
            "eval_steps": 200,
            "save_steps": 200,
            "save_total_limit": 2,
        }
    )


@dataclass
class RewardConfig:
    """The ranking loss and what is stored with the reward model."""

    loss: str = "pairwise"
    margin: float | None = None
    num_normalization_prompts: int = 256


@dataclass
class RewardStageConfig(StageConfig):
    """`python -m rlhf.reward`."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 1,
            "learning_rate": 9e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "logging_steps": 10,
            "eval_steps": 200,
            "save_steps": 200,
            "save_total_limit": 2,
        }
    )


@dataclass
class ScorerConfig:
    """What scores a response."""

    path: str | None = None
    normalize: str = "shift"
    batch_size: int = 32


@dataclass
class CriticConfig:
    """The value model."""

    init: str = "reward"
    learning_rate: float = 3e-6
    warmup_updates: int = 0


@dataclass
class PPOConfig:
    """The algorithm; names are those of TRL's late PPOConfig where one existed."""

    num_updates: int = 200
    batch_size: int = 64
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    micro_batch_size: int = 8
    rollout_batch_size: int = 64
    max_prompt_length: int | None = None
    response_length: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    allow_off_policy_sampling: bool = False
    missing_eos_penalty: float | None = -1.0
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    target_kl: float | None = None
    learning_rate: float = 3e-6
    lr_schedule: str = "linear"
    adam_epsilon: float = 1e-5
    max_grad_norm: float = 1.0


@dataclass
class EvaluationConfig:
    """Held-out evaluation during and after PPO."""

    every: int = 20
    num_prompts: int = 64
    scorer: str | None = None


@dataclass
class CheckpointConfig:
    """When PPO writes a checkpoint that it can resume from."""

    every: int = 20
    keep_last: int = 2


@dataclass
class PPOStageConfig(StageConfig):
    """`python -m rlhf.ppo`."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTStageConfig,
    "reward": RewardStageConfig,
    "ppo": PPOStageConfig,
}


# --- Checks -------------------------------------------------------------------------------------


def check(config: StageConfig) -> None:
    """Check a stage's configuration, before anything expensive starts.

    Raises:
        InputError: names every missing value at once, or every value out of range at once.
    """
    missing = _missing(config)
    if missing:
        raise InputError("missing values:\n  " + "\n  ".join(missing))
    problems = [message for ok, message in _rules(config) if not ok]
    if problems:
        raise InputError("\n".join(problems))


def _missing(config: StageConfig) -> list[str]:
    found = []
    if config.dataset.path is None:
        found.append("dataset.path: file or Hub name of the rows, e.g. dataset.path=train.jsonl")
    if isinstance(config, SFTStageConfig):
        if config.model.path is None and not config.model.config:
            found.append(
                "model.path: Hub id or directory, e.g. model.path=EleutherAI/pythia-410m (or "
                "model.config to train from scratch)"
            )
        if config.model.path is None and config.model.tokenizer is None:
            found.append("model.tokenizer: Hub id or directory; needed when model.path is not set")
    elif config.model.path is None and not (config.stage_dir("sft") / "final").is_dir():
        found.append(_no_stage("model.path", config, "sft"))
    if isinstance(config, PPOStageConfig):
        if config.scorer.path is None and not (config.stage_dir("reward") / "final").is_dir():
            found.append(_no_stage("scorer.path", config, "reward"))
        if config.scorer.path == "python:":
            found.append("scorer.path: a function, e.g. scorer.path=python:my_module.my_score")
    return found


def _no_stage(key: str, config: StageConfig, stage: str) -> str:
    return (
        f"{key}: {config.stage_dir(stage) / 'final'} does not exist; run `python -m rlhf.{stage} "
        f"run_name={config.run_name}` first, or set {key}=<directory>"
    )


def _rules(config: StageConfig) -> Iterable[tuple[bool, str]]:
    """Yield (holds, message when it does not) for each rule on the values."""

    def at_least(name: str, bound: float, strict: bool = False) -> tuple[bool, str]:
        value = attrgetter(name)(config)
        ok = value is None or (value > bound if strict else value >= bound)
        return ok, f"{name} must be {'>' if strict else '>='} {bound}, got {value}"

    def one_of(name: str, allowed: Iterable[str]) -> tuple[bool, str]:
        value = attrgetter(name)(config)
        return value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}"

    def within(name: str, low: float, high: float) -> tuple[bool, str]:
        value = attrgetter(name)(config)
        return low <= value <= high, f"{name} must lie in [{low}, {high}], got {value}"

    yield one_of("model.dtype", DTYPES)
    yield one_of("precision", ("auto", "float32", "bfloat16"))
    yield one_of("tracker.name", ("none", "wandb"))
    if config.tracker.mode is not None:
        yield one_of("tracker.mode", ("online", "offline", "disabled"))
    yield within("dataset.eval_fraction", 0, 0.9)
    yield at_least("dataset.max_length", 2)
    yield from (at_least(f"dataset.{name}", 1) for name in ("max_rows", "max_eval_rows"))
    yield at_least("peft.r", 1)
    yield within("peft.dropout", 0, 1)
    yield (
        "/" not in config.run_name and config.run_name not in ("", ".", ".."),
        f"run_name must be one folder name, got {config.run_name!r}",
    )
    if isinstance(config, SFTStageConfig):
        yield at_least("num_samples", 0)
        yield at_least("response_length", 1)
        yield at_least("temperature", 0, strict=True)
    if isinstance(config, RewardStageConfig):
        yield one_of("reward.loss", ("pairwise", "plackett_luce"))
        yield at_least("reward.num_normalization_prompts", 1)
    if isinstance(config, PPOStageConfig):
        yield from _ppo_rules(config, at_least, one_of, within)


def _ppo_rules(
    config: PPOStageConfig, at_least: Any, one_of: Any, within: Any
) -> Iterable[tuple[bool, str]]:
    ppo = config.ppo
    sizes = "batch_size num_mini_batches micro_batch_size rollout_batch_size"
    counts = f"num_updates num_ppo_epochs {sizes} response_length max_prompt_length"
    yield from (at_least(f"ppo.{name}", 1) for name in counts.split())
    others = "scorer.batch_size evaluation.every checkpoint.every checkpoint.keep_last"
    yield from (at_least(name, 1) for name in others.split())
    not_negative = "ppo.kl_coef ppo.top_k ppo.vf_coef ppo.learning_rate critic.learning_rate"
    yield from (at_least(name, 0) for name in not_negative.split())
    yield from (at_least(name, 0) for name in ("critic.warmup_updates", "evaluation.num_prompts"))
    positive = "temperature adam_epsilon max_grad_norm cliprange cliprange_value target_kl"
    yield from (at_least(f"ppo.{name}", 0, strict=True) for name in positive.split())
    yield from (within(f"ppo.{name}", 0, 1) for name in ("gamma", "lam"))
    yield one_of("ppo.kl_estimator", ("k1", "k2", "k3"))
    yield one_of("ppo.lr_schedule", ("linear", "constant"))
    yield one_of("scorer.normalize", ("none", "shift", "standardise"))
    yield one_of("critic.init", ("reward", "policy"))
    yield (
        ppo.num_mini_batches < 1 or ppo.batch_size % ppo.num_mini_batches == 0,
        f"ppo.batch_size must be divisible by ppo.num_mini_batches, got {ppo.batch_size} and "
        f"{ppo.num_mini_batches}",
    )
    off_policy = ppo.top_p != 1.0 or ppo.top_k != 0
    yield (
        ppo.allow_off_policy_sampling or not off_policy,
        f"ppo.top_p={ppo.top_p} and ppo.top_k={ppo.top_k} sample from another distribution than "
        "the one PPO scores; leave them at 1.0 and 0, or set ppo.allow_off_policy_sampling=true",
    )
    yield 0 < ppo.top_p <= 1, f"ppo.top_p must lie in (0, 1], got {ppo.top_p}"
    from_python = str(config.scorer.path).startswith("python:")
    yield (
        not (from_python and config.critic.init == "reward"),
        "critic.init=reward needs a reward model, but scorer.path is a Python function: set "
        "critic.init=policy",
    )


# --- Objects named in a configuration -----------------------------------------------------------


def load_object(dotted: str, field_name: str) -> Any:
    """Import the Python object that a configuration names, e.g. `my_package.module.function`.

    Args:
        dotted: dotted path; a leading `python:` is dropped.
        field_name: configuration key, for the message.

    Raises:
        InputError: the module or the name in it does not exist.
    """
    module_name, _, name = dotted.removeprefix("python:").rpartition(".")
    if not module_name:
        raise InputError(
            f"{field_name}={dotted!r} is not a dotted path such as my_module.my_function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{field_name}={dotted!r} cannot be imported ({error}); the module is looked for in "
            "the working directory and in PYTHONPATH"
        ) from error


def build_arguments(
    factory: Callable[..., Any], values: dict[str, Any], reserved: dict[str, Any]
) -> Any:
    """Build a library's argument object from the free mapping `trainer:`.

    Args:
        factory: a dataclass such as `trl.SFTConfig`.
        values: what the user wrote under `trainer:`.
        reserved: what the stage itself sets; naming one of these under `trainer:` is an error.

    Raises:
        InputError: an unknown or reserved name (with the nearest valid ones), or a value that the
            library refuses.
    """
    known = [f.name for f in dataclasses.fields(factory) if f.init]  # type: ignore[arg-type]
    for name in values:
        if name in reserved:
            raise InputError(f"trainer.{name} is set by the stage itself; remove it from trainer")
        if name not in known:
            raise InputError(
                f"trainer.{name} is not an argument of {factory.__name__}.{nearest(name, known)}"
            )
    try:
        return factory(**values, **reserved)
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {factory.__name__} refuses these values: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def config_keys(config_class: type, prefix: str = "") -> list[str]:
    """All dotted keys of a stage's dataclass."""
    keys = []
    for f in dataclasses.fields(config_class):
        keys.append(prefix + f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            keys += config_keys(type(default), f"{prefix}{f.name}.")
        elif isinstance(default, dict):
            keys += [f"{prefix}{f.name}.{key}" for key in default]
    return keys


# --- Reading and writing ------------------------------------------------------------------------

Config = TypeVar("Config", bound=StageConfig)


def save_config(config: StageConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a configuration that `save_config` wrote.

    Raises:
        InputError: a key that the stage does not have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(schema(config_class), OmegaConf.load(path))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {explain(error, config_class)}") from error


def schema(config_class: type) -> Any:
    """Turn a stage's dataclass into the OmegaConf node that Hydra merges everything into."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(config_class)
    # free mappings: any key may be set without "+"
    for mapping in [node.model.config, *([node.trainer] if "trainer" in node else [])]:
        OmegaConf.set_struct(mapping, False)
    return node


def explain(error: BaseException, config_class: type) -> str:
    """Say what is wrong with a key or value, in one line, with the nearest valid key."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            key = str(getattr(cause, "full_key", None) or getattr(cause, "key", ""))
            hint = nearest(key, config_keys(config_class))
            return f"unknown key {key!r}.{hint} (--help lists the keys)"
        if isinstance(cause, ValidationError):
            reason = str(cause).splitlines()[0]
            return f"{cause.full_key}: {reason}" if getattr(cause, "full_key", None) else reason
        cause = cause.__cause__ or cause.__context__
    return str(error)
