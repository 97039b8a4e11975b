"""Checks of a stage's configuration, before anything expensive starts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlhf.config.knobs import (
    ADVANTAGES,
    COMBINATIONS,
    COMPLETIONS,
    DTYPES,
    NORMALIZATIONS,
    InputError,
    MissingValues,
    ModelConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
)
from rlhf.config.reading import show

YEAR = 365 * 24 * 3600  # seconds

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def check(config: StageConfig) -> None:
    """Check a stage's configuration, before anything expensive starts.

    Raises:
        InputError: names every missing value at once, or every value out of range at once.
    """
    check_finite(config)
    missing = _missing(config)
    if missing:
        raise MissingValues("missing values:\n  " + "\n  ".join(missing))
    problems = [message for ok, message in _rules(config) if not ok]
    if problems:
        raise InputError("\n".join(problems))
    if config.model.quantization is not None and find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.quantization={config.model.quantization} needs bitsandbytes, which is not "
            "installed: pip install 'rlhf[quant]', or set model.quantization=null"
        )


def check_finite(config: Any, prefix: str = "") -> None:
    """Check that every number in a dataclass is finite: no setting means anything at infinity.

    Values of `model.config` are left to the model: some families have infinite limits.

    Args:
        prefix: of the names in messages, e.g. "scorer.".

    Raises:
        InputError: names every number that is not finite at once.
    """
    problems = [
        f"{name} must be a finite number, got {value}"
        for name, value in _numbers(config, prefix.removesuffix("."))
        if not math.isfinite(value)
    ]
    if problems:
        raise InputError("\n".join(problems))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every float in a value, however deep, with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{i}]")
    elif dataclasses.is_dataclass(value) or isinstance(value, dict):
        for key, inner in (value if isinstance(value, dict) else vars(value)).items():
            inner_name = f"{name}.{key}" if name else str(key)
            if inner_name != "model.config":
                yield from _numbers(inner, inner_name)


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
        if config.mix.fraction > 0 and config.mix.path is None:
            found.append("mix.path: file or Hub name of the text, e.g. mix.path=text.jsonl")
    elif config.model.path is None and not (config.stage_dir("sft") / "final").is_dir():
        found.append(_no_stage("model.path", config, "sft"))
    if isinstance(config, RewardStageConfig):
        normalization = config.normalization
        if normalization.completions == "demonstrations" and normalization.path is None:
            found.append(
                "normalization.path: file or Hub name of the SFT stage's rows, e.g. "
                "normalization.path=train.jsonl normalization.format=alpaca"
            )
    if isinstance(config, PPOStageConfig):
        scorer, own = config.scorer, config.stage_dir("reward") / "final"
        if scorer.path is None and not scorer.components and not own.is_dir():
            found.append(_no_stage("scorer.path", config, "reward"))
        if config.ptx.coef > 0 and config.ptx.path is None:
            found.append("ptx.path: file or Hub name of the text, e.g. ptx.path=text.jsonl")
        if config.scorer.path == "python:":
            found.append("scorer.path: a function, e.g. scorer.path=python:my_module.my_score")
        found += [
            f"scorer.components[{i}].path: the final/ of a reward stage, or python:module.function"
            for i, component in enumerate(scorer.components)
            if not component.path
        ]
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

    def one_of(name: str, allowed: Iterable[str | bool]) -> tuple[bool, str]:
        value = attrgetter(name)(config)
        listed = ", ".join(str(a).lower() if isinstance(a, bool) else a for a in allowed)
        return value in allowed, f"{name} must be one of {listed}, got {value!r}"

    def within(name: str, low: float, high: float) -> tuple[bool, str]:
        value = attrgetter(name)(config)
        return low <= value <= high, f"{name} must lie in [{low}, {high}], got {value}"

    yield one_of("model.dtype", DTYPES)
    yield from _model_rules(config)
    yield one_of("precision", ("auto", "float32", "bfloat16"))
    yield one_of("resume", (True, False, "auto"))
    yield from (at_least(f"checkpoint.{name}", 1) for name in ("every", "keep_last"))
    yield at_least("checkpoint.grace_seconds", 0, strict=True)
    grace = config.checkpoint.grace_seconds
    yield (
        not grace > YEAR,
        f"checkpoint.grace_seconds must be at most {YEAR} (a year), got {grace}",
    )
    yield one_of("tracker.name", ("none", "wandb"))
    if config.tracker.mode is not None:
        yield one_of("tracker.mode", ("online", "offline", "disabled"))
    yield from _dataset_rules(config, at_least, one_of, within)
    yield from (at_least("peft.r", 1), within("peft.dropout", 0, 1))
    yield one_of("peft.train_new_tokens", (True, False, "auto"))
    yield (
        "/" not in config.run_name and config.run_name not in ("", ".", ".."),
        f"run_name must be one folder name, got {config.run_name!r}",
    )
    if isinstance(config, SFTStageConfig):
        yield at_least("num_samples", 0)
        yield at_least("response_length", 1)
        yield at_least("temperature", 0, strict=True)
        yield 0 < config.top_p <= 1, f"top_p must lie in (0, 1], got {config.top_p}"
        yield within("mix.fraction", 0, 0.9)
    if isinstance(config, SFTStageConfig | RewardStageConfig):
        yield at_least("batch_size", 1)
        accumulated = config.trainer.get("gradient_accumulation_steps", 1)
        yield (
            config.batch_size is None or accumulated == 1,
            f"batch_size={config.batch_size} sets trainer.gradient_accumulation_steps, which is "
            f"{accumulated}; leave that at 1, or set batch_size=null",
        )
    if isinstance(config, RewardStageConfig):
        yield from _reward_rules(config, at_least, one_of)
    if isinstance(config, PPOStageConfig):
        yield from _ppo_rules(config, at_least, one_of, within)


def _dataset_rules(
    config: StageConfig, at_least: Any, one_of: Any, within: Any
) -> Iterable[tuple[bool, str]]:
    yield within("dataset.eval_fraction", 0, 0.9)
    yield at_least("dataset.max_length", 2)
    yield from (at_least(f"dataset.{name}", 1) for name in ("max_rows", "max_eval_rows"))
    yield one_of("dataset.on_bad_row", ("drop", "stop"))
    if not isinstance(config, SFTStageConfig):
        yield (
            not config.dataset.split_long,
            "dataset.split_long splits the conversations of SFT and has no meaning here; set it to "
            "false",
        )


def _attention_rules(model: ModelConfig) -> Iterable[tuple[bool, str]]:
    attention = model.attn_implementation
    yield (
        attention is None or attention in ATTENTION or "/" in attention,
        f"model.attn_implementation must be one of {', '.join(ATTENTION)}, null, or a kernel of "
        f"the Hub, got {attention!r}",
    )
    yield (
        attention != "flash_attention_2" or any(map(find_spec, ("flash_attn", "kernels"))),
        "model.attn_implementation=flash_attention_2 needs flash-attn, which is not installed: pip "
        "install flash-attn, or set model.attn_implementation=sdpa",
    )


def _model_rules(config: StageConfig) -> Iterable[tuple[bool, str]]:
    yield from _token_rules(config.model)
    yield from _attention_rules(config.model)
    path, revision = config.model.path, config.model.revision
    yield (
        revision is None or path is None or not Path(path).is_dir(),
        f"model.revision={revision} is of a Hub model, but model.path={path} is a directory here; "
        "set model.revision=null",
    )
    values, builds = config.model.config, isinstance(config, SFTStageConfig)
    yield (
        not values or (builds and path is None),
        f"model.config={show(values)} builds a model with random weights, but model.path="
        f"{path or 'null'} loads a trained one; {'set model.path=null, or ' * builds}remove model."
        f"config (if a recipe sets it: {' '.join(f'~model.config.{key}' for key in values)})",
    )
    quantization, dropout = config.model.quantization, config.model.dropout
    yield (
        quantization in (None, "8bit", "4bit"),
        f"model.quantization must be one of 8bit, 4bit, null, got {quantization!r}",
    )
    yield (
        quantization is None or config.peft.enabled,
        f"model.quantization={quantization}: quantised weights cannot be trained, only adapters on "
        "them; set peft=lora, or model.quantization=null",
    )
    yield (
        dropout is None or 0 <= dropout < 1,
        f"model.dropout must lie in [0, 1), e.g. 0.2, got {dropout}",
    )
    if isinstance(config, SFTStageConfig):
        yield (
            quantization is None or config.model.path is not None,
            f"model.quantization={quantization} is of a model that has been trained, but "
            "model.config builds one with random weights; give model.path, or set "
            "model.quantization=null",
        )
    if isinstance(config, PPOStageConfig):
        yield (
            dropout is None,
            f"model.dropout={dropout}: PPO has all dropout off, as its ratios compare two passes "
            "over the same tokens; set model.dropout=null, or give it to the SFT stage only",
        )


def _token_rules(model: ModelConfig) -> Iterable[tuple[bool, str]]:
    for name in ("special_tokens", "stop_strings"):
        texts = getattr(model, name) or []
        yield (
            all(texts) and len(set(texts)) == len(texts),
            f"model.{name} must be texts that are not empty and differ, got {texts}",
        )
    yield (
        model.pad_token is None or model.pad_token != model.eos_token,
        f"model.pad_token={model.pad_token!r} is model.eos_token too, but PPO never samples the "
        "pad token: no response could end; give another one, or null",
    )


def _reward_rules(
    config: RewardStageConfig, at_least: Any, one_of: Any
) -> Iterable[tuple[bool, str]]:
    reward = config.reward
    yield one_of("reward.loss", ("pairwise", "plackett_luce"))
    not_negative = ("margin", "margin_scale", "center_coef")
    yield from (at_least(f"reward.{name}", 0) for name in not_negative)
    yield from (
        at_least(f"reward.{name}", 1) for name in ("num_normalization_prompts", "tokens_per_batch")
    )
    yield one_of("normalization.completions", COMPLETIONS)
    yield at_least("normalization.response_length", 1)
    yield (
        0 <= reward.label_smoothing < 0.5,
        f"reward.label_smoothing must lie in [0, 0.5), got {reward.label_smoothing}",
    )
    yield (
        reward.loss != "plackett_luce" or not reward.label_smoothing,
        f"reward.label_smoothing={reward.label_smoothing} is of single pairs, which "
        "reward.loss=plackett_luce has none of; set it to 0, or reward.loss=pairwise",
    )
    yield (
        config.batch_size is None or reward.tokens_per_batch is None,
        f"batch_size={config.batch_size} counts prompts, but with reward.tokens_per_batch="
        f"{reward.tokens_per_batch} a step has as many as fit; set one of them to null",
    )


def _ppo_rules(
    config: PPOStageConfig, at_least: Any, one_of: Any, within: Any
) -> Iterable[tuple[bool, str]]:
    ppo = config.ppo
    sizes = "batch_size samples_per_prompt num_mini_batches micro_batch_size rollout_batch_size"
    counts = f"num_updates num_ppo_epochs {sizes} response_length max_prompt_length kl_horizon"
    counts += " save_rollouts"
    yield from (at_least(f"ppo.{name}", 1) for name in counts.split())
    others = "evaluation.every ptx.batch_size"
    yield from (at_least(name, 1) for name in others.split())
    yield at_least("ptx.max_length", 2)
    not_negative = "kl_coef top_k vf_coef learning_rate entropy_coef weight_decay"
    not_negative += " lr_warmup_updates"
    yield from (at_least(f"ppo.{name}", 0) for name in not_negative.split())
    not_negative = "critic.learning_rate critic.warmup_updates evaluation.num_prompts ptx.coef"
    yield from (at_least(name, 0) for name in f"{not_negative} evaluation.select_kl_coef".split())
    positive = "temperature adam_epsilon max_grad_norm cliprange cliprange_value target_kl"
    positive += " kl_target clip_scores"
    yield from (at_least(f"ppo.{name}", 0, strict=True) for name in positive.split())
    yield at_least("ppo.dual_clip", 1, strict=True)
    yield from (within(f"ppo.{name}", 0, 1) for name in ("gamma", "lam", "lr_warmup_start"))
    yield (
        len(ppo.adam_betas) == 2 and all(0 <= beta < 1 for beta in ppo.adam_betas),
        f"ppo.adam_betas must be two numbers in [0, 1), e.g. [0.9, 0.95], got {ppo.adam_betas}",
    )
    yield (
        ppo.ema_decay is None or 0 < ppo.ema_decay < 1,
        (f"ppo.ema_decay must lie in (0, 1), e.g. 0.992, got {ppo.ema_decay}"),
    )
    yield one_of("preflight", (True, False, "only"))
    yield one_of("ppo.kl_estimator", ("k1", "k2", "k3"))
    yield one_of("ppo.kl_in", ("reward", "loss"))
    yield one_of("ppo.advantage", ADVANTAGES)
    yield one_of("ppo.lr_schedule", ("linear", "constant"))
    yield from _scorer_rules(config.scorer)
    init = config.critic.init
    yield (
        init in ("reward", "policy") or Path(init).is_dir(),
        "critic.init must be reward, policy, or the directory of a trained critic "
        f"(runs/<run_name>/ppo/critic), got {init!r}",
    )
    yield one_of("evaluation.select", ("score_minus_kl", "independent_score", "last"))
    yield from _watchdog_rules(config, at_least, within)
    yield from _combination_rules(config)


def check_scorer_config(scorer: ScorerConfig) -> None:
    """Check a scorer's configuration by itself; `check` does so for the PPO stage.

    Raises:
        InputError: names every value out of range at once.
    """
    check_finite(scorer, "scorer.")
    problems = [message for ok, message in _scorer_rules(scorer) if not ok]
    if problems:
        raise InputError("\n".join(problems))


def _scorer_rules(scorer: ScorerConfig) -> Iterable[tuple[bool, str]]:
    components, combine = scorer.components, scorer.combine
    yield scorer.batch_size >= 1, f"scorer.batch_size must be >= 1, got {scorer.batch_size}"
    yield scorer.std_coef >= 0, f"scorer.std_coef must be >= 0, got {scorer.std_coef}"
    wrong = [scorer.normalize] + [c.normalize for c in components if c.normalize is not None]
    wrong = [value for value in wrong if value not in NORMALIZATIONS]
    yield (
        not wrong,
        f"scorer.normalize must be one of {', '.join(NORMALIZATIONS)}, got {', '.join(wrong)}",
    )
    yield (
        combine in COMBINATIONS,
        f"scorer.combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}",
    )
    yield (
        not components or scorer.path is None,
        f"scorer.path={scorer.path} and scorer.components exclude each other; make the former one "
        "of the components",
    )
    yield (
        combine == "weighted_sum" or len(components) > 1,
        f"scorer.combine={combine} combines several scorers, but scorer.components names "
        f"{len(components)}; name at least two",
    )
    weights = [component.weight for component in components]
    yield (
        0 not in weights,
        f"scorer.components: a weight must be a number other than 0, got {weights}",
    )
    yield (
        combine == "weighted_sum" or all(weight == 1 for weight in weights),
        f"scorer.combine={combine} knows no weights, got {weights}; leave them at 1",
    )
    gates = [component.gate for component in components]
    yield (
        all(gate is None or 0 < gate < 1 for gate in gates),
        f"scorer.components: a gate must lie in (0, 1), e.g. 0.15, got {gates}",
    )
    yield (
        not components or None in gates,
        f"scorer.components: every one has a gate, {gates}; the responses that pass them all need "
        "another without one",
    )
    names = [component.label for component in components]
    yield (
        len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names),
        "scorer.components must have names that differ, of letters, digits and _.-, got "
        f"{', '.join(names)}; set name",
    )


def _watchdog_rules(config: PPOStageConfig, at_least: Any, within: Any) -> Iterable[Any]:
    positive = "first_ratio negative_kl kl_budget score_std grad_norm sampler_gap"
    yield from (at_least(f"watchdog.{name}", 0, strict=True) for name in positive.split())
    yield from (at_least(f"watchdog.{name}", 1, strict=True) for name in ("ratio", "length_drift"))
    for name in ("clip_fraction", "entropy_drop", "eos_rate"):
        if getattr(config.watchdog, name) is not None:
            yield within(f"watchdog.{name}", 0, 1)
    if config.watchdog.explained_variance is not None:
        yield (
            config.watchdog.explained_variance < 1,
            (f"watchdog.explained_variance must be < 1, got {config.watchdog.explained_variance}"),
        )


def _score_rules(ppo: PPOConfig) -> Iterable[tuple[bool, str]]:
    yield (
        not (ppo.mask_truncated and ppo.whiten_rewards and ppo.advantage in ("rloo", "grpo")),
        f"ppo.mask_truncated=true and ppo.whiten_rewards=true give cut responses no rewards, but "
        f"ppo.advantage={ppo.advantage} compares responses with them; set ppo.whiten_rewards=false",
    )
    yield (
        not (ppo.scale_scores and ppo.whiten_scores),
        "ppo.scale_scores and ppo.whiten_scores both set the scale of the scores; set one to false",
    )


def _combination_rules(config: PPOStageConfig) -> Iterable[tuple[bool, str]]:
    """Values that are fine alone and wrong together."""
    ppo = config.ppo
    for divisor in ("num_mini_batches", "samples_per_prompt"):
        number = getattr(ppo, divisor)
        yield (
            number < 1 or ppo.batch_size % number == 0,
            f"ppo.batch_size must be divisible by ppo.{divisor}, got {ppo.batch_size} and {number}",
        )
    yield (
        ppo.samples_per_prompt > 1 or ppo.advantage not in ("rloo", "grpo"),
        f"ppo.advantage={ppo.advantage} compares the responses of one prompt, but "
        f"ppo.samples_per_prompt={ppo.samples_per_prompt}; set it to 2 or more, e.g. 4",
    )
    yield (
        ppo.target_kl is None or ppo.num_ppo_epochs * ppo.num_mini_batches > 1,
        f"ppo.target_kl={ppo.target_kl} has nothing to skip with one optimiser step an update; "
        "raise ppo.num_ppo_epochs or ppo.num_mini_batches, or set ppo.target_kl=null",
    )
    yield (
        ppo.kl_in == "reward" or ppo.kl_estimator != "k1",
        "ppo.kl_in=loss with ppo.kl_estimator=k1 has an expected gradient of 0; use "
        "ppo.kl_estimator=k3 (GRPO) or k2, or ppo.kl_in=reward",
    )
    yield (
        ppo.kl_target is None or ppo.kl_coef > 0,
        f"ppo.kl_target={ppo.kl_target} multiplies ppo.kl_coef, which is 0; start it above 0",
    )
    yield from _score_rules(ppo)
    off_policy = ppo.top_p != 1.0 or ppo.top_k != 0
    yield (
        ppo.allow_off_policy_sampling or not off_policy,
        f"ppo.top_p={ppo.top_p} and ppo.top_k={ppo.top_k} sample from another distribution than "
        "the one PPO scores; leave them at 1.0 and 0, or set ppo.allow_off_policy_sampling=true",
    )
    yield 0 < ppo.top_p <= 1, f"ppo.top_p must lie in (0, 1], got {ppo.top_p}"
    first = config.scorer.components[0] if config.scorer.components else config.scorer
    from_python = str(first.path).startswith("python:")
    yield (
        not (from_python and config.critic.init == "reward" and ppo.advantage == "gae"),
        "critic.init=reward needs a reward model, but scorer.path is a Python function: set "
        "critic.init=policy",
    )
    yield (
        config.evaluation.select != "independent_score" or config.evaluation.scorer is not None,
        "evaluation.select=independent_score needs evaluation.scorer, e.g. "
        "evaluation.scorer=python:my_module.my_score",
    )
    yield (
        not config.critic.warmup_updates or ppo.advantage == "gae",
        f"critic.warmup_updates={config.critic.warmup_updates} has no critic to warm up with "
        f"ppo.advantage={ppo.advantage}; set it to 0",
    )
