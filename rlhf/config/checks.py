"""What a range cannot say about a configuration: missing values, and rules between knobs.

The range of a single knob is declared with it, see `rlhf.config.fields`. Rules of the PPO stage and
of scorers: `rlhf.config.ppo_checks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlhf.config.errors import refuse, show
from rlhf.config.fields import value_problems
from rlhf.config.knobs import (
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
)
from rlhf.config.paths import default_paths
from rlhf.config.ppo_checks import ppo_rules, scorer_rules
from rlhf.config.saved_config import config_file_of_run, resume_overrides
from rlhf.config.stage_command import stage_command
from rlhf.config.trainer_values import trainer_problems

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def check(config: StageConfig) -> None:
    """Check a stage's configuration, before anything expensive starts.

    Raises:
        InputError: names every bad and every missing value at once.
    """
    refuse(*problems_of(config))


def problems_of(config: StageConfig) -> tuple[list[str], list[str]]:
    """What is wrong in a stage's configuration, and which values are missing."""
    problems = [*value_problems(config), *_rules(config)]
    return problems or _missing_packages(config), list(_missing(config))


def _missing_packages(config: StageConfig) -> list[str]:
    problems = []
    if config.model.quantization is not None and find_spec("bitsandbytes") is None:
        problems.append(
            f"model.quantization={config.model.quantization} needs bitsandbytes, which is not "
            "installed: pip install 'rlhf[quant]', or set model.quantization=null"
        )
    missing = [name for name in config.tracker.names if find_spec(name) is None]
    for name in missing:
        package = name.replace("_", "-")
        problems.append(f"tracker {name} is not installed: pip install {package}, or tracker=none")
    return problems


def check_scorer_config(scorer: ScorerConfig) -> None:
    """Check a scorer's configuration by itself; `check` does so for the PPO stage."""
    refuse([*value_problems(scorer, "scorer"), *scorer_rules(scorer)])


# --- Missing values -------------------------------------------------------------------------------


def _missing(config: StageConfig) -> Iterator[str]:
    if config.dataset.path is None:
        yield "dataset.path: file or Hub name of the rows, e.g. dataset.path=train.jsonl"
    if isinstance(config, SFTStageConfig):
        yield from _missing_in_sft(config)
    for key, path in default_paths(config).items():
        if not path.is_dir():
            yield f"{key}: {path} does not exist; {_way_to(path, config)}, or set {key}=<directory>"
    if isinstance(config, RewardStageConfig):
        normalization = config.normalization
        if normalization.completions == "demonstrations" and normalization.path is None:
            yield (
                "normalization.path: file or Hub name of the SFT stage's rows, e.g. "
                "normalization.path=train.jsonl normalization.format=alpaca"
            )
    if isinstance(config, PPOStageConfig):
        if config.ptx.coef > 0 and config.ptx.path is None:
            yield "ptx.path: file or Hub name of the text, e.g. ptx.path=text.jsonl"
        if config.scorer.path == "python:":
            yield "scorer.path: a function, e.g. scorer.path=my_module.my_score"
        for i, component in enumerate(config.scorer.components):
            if not component.path:
                yield f"scorer.components[{i}].path: final/ of a reward stage, or module.function"


def _way_to(final: Path, config: StageConfig) -> str:
    """How the missing result of an earlier stage is made."""
    stage = final.parent.name
    rows = "<rows> model.path=<model>" if stage == "sft" else "<ranked rows>"
    overrides, way = f"run_name={config.run_name} dataset.path={rows}", "run `{}` first"
    if config_file_of_run(final.parent) is not None:
        overrides, way = resume_overrides(config, "auto"), "finish that stage with `{}`"
    return way.format(stage_command(stage, [overrides], config.distributed))


def _missing_in_sft(config: SFTStageConfig) -> Iterator[str]:
    model = config.model
    if model.path is None and not model.config:
        yield (
            "model.path: Hub id, directory or GGUF file, e.g. model.path=EleutherAI/pythia-410m "
            "(or model.config to train from scratch)"
        )
    if model.path is None and model.tokenizer is None:
        yield "model.tokenizer: Hub id or directory; needed when model.path is not set"
    if config.mix.fraction > 0 and config.mix.path is None:
        yield "mix.path: file or Hub name of the text, e.g. mix.path=text.jsonl"


# --- Rules: each yields a message where the configuration breaks it -------------------------------


def _rules(config: StageConfig) -> Iterator[str]:
    name = config.run_name
    if name in ("", ".", "..") or "/" in name or min(name) < " " or len(os.fsencode(name)) > 255:
        yield f"run_name must be one folder name, got {show(name)}"
    yield from _model_rules(config)
    yield from _token_rules(config.model)
    if isinstance(config, SFTStageConfig | RewardStageConfig):
        yield from trainer_problems(
            config.trainer, "reward" if isinstance(config, RewardStageConfig) else "sft"
        )
        accumulated = config.trainer.get("gradient_accumulation_steps", 1)
        if config.batch_size is not None and accumulated != 1:
            yield (
                f"batch_size={config.batch_size} sets trainer.gradient_accumulation_steps, which "
                f"is {accumulated}; leave that at 1, or set batch_size=null"
            )
    if not isinstance(config, PPOStageConfig) and config.checkpoint.background:
        yield "checkpoint.background=true: only PPO has rollouts to write behind; leave it null"
    if not isinstance(config, SFTStageConfig) and config.dataset.split_long:
        yield "dataset.split_long=true splits conversations of SFT only; set it to false"
    if isinstance(config, RewardStageConfig):
        yield from _reward_rules(config)
    if isinstance(config, PPOStageConfig):
        yield from ppo_rules(config)


def _model_rules(config: StageConfig) -> Iterator[str]:
    model, is_sft = config.model, isinstance(config, SFTStageConfig)
    attention = model.attn_implementation
    if attention is not None and attention not in ATTENTION and "/" not in attention:
        yield (
            f"model.attn_implementation must be one of {', '.join(ATTENTION)}, null, or a kernel "
            f"from the Hub, got {attention!r}"
        )
    if attention == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        yield "model.attn_implementation=flash_attention_2 needs flash-attn; install it or use sdpa"
    if model.revision is not None and model.path is not None and Path(model.path).is_dir():
        yield (
            f"model.revision={model.revision} applies to Hub models, but model.path={model.path} "
            "is a local directory; set model.revision=null"
        )
    if model.config and not (is_sft and model.path is None):
        yield (
            f"model.config={show(model.config)} builds a model with random weights, but model.path="
            f"{model.path or 'null'} loads a trained one; "
            f"{'set model.path=null, or ' if is_sft else ''}remove model.config (if a recipe sets "
            f"it: {' '.join(f'~model.config.{key}' for key in model.config)})"
        )
    if model.quantization is not None and not config.peft.enabled:
        yield (
            f"model.quantization={model.quantization}: quantised weights cannot be trained, only "
            "adapters on them; set peft=lora, or model.quantization=null"
        )
    if model.quantization is not None and model.path is None and is_sft:
        yield f"model.quantization={model.quantization} needs pretrained weights: set model.path"
    if config.peft.enabled and config.peft.save == "adapter" and model.path is None and is_sft:
        yield (
            "peft.save=adapter needs a base model on the disk or the Hub, but without model.path "
            "the base has random weights that no file holds; set model.path, or peft.save=merged"
        )
    if model.dropout is not None and isinstance(config, PPOStageConfig):
        yield (
            f"model.dropout={model.dropout}: PPO uses no dropout, because its ratios compare two "
            "passes over the same tokens; set model.dropout=null, or set it in the SFT stage only"
        )


def _token_rules(model: ModelConfig) -> Iterator[str]:
    for name in ("special_tokens", "stop_strings"):
        texts = getattr(model, name) or []
        if not all(texts) or len(set(texts)) != len(texts):
            yield f"model.{name} must be distinct, non-empty texts, got {texts}"


def _reward_rules(config: RewardStageConfig) -> Iterator[str]:
    reward = config.reward
    if reward.loss == "plackett_luce" and reward.label_smoothing:
        yield f"reward.label_smoothing={reward.label_smoothing} needs reward.loss=pairwise, or 0"
    if config.batch_size is not None and reward.tokens_per_batch is not None:
        yield (
            f"batch_size={config.batch_size} counts prompts, but reward.tokens_per_batch="
            f"{reward.tokens_per_batch} puts as many as fit into a step; set one of them to null"
        )
