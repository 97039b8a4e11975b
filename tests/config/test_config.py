"""The configuration: YAML equals dataclass, every rule fires, every message names key and remedy.

Leaves out the command line (test_command_line.py) and what the stages do with the values.
Run: python -m pytest tests/config/test_config.py
"""

import ast
import dataclasses
import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.config import (
    CONF_DIR,
    STAGES,
    InputError,
    PPOStageConfig,
    ScorerComponent,
    SFTStageConfig,
    build_arguments,
    check,
    checks,
    config_keys,
    load_config,
    load_object,
    nearest,
    save_config,
    schema,
    with_default_paths,
)


def compose_stage(stage, *overrides):
    """What Hydra makes of `python -m rlhf.<stage> recipe=null ...`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{stage}_schema", node=schema(STAGES[stage]))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return OmegaConf.to_object(compose(stage, overrides=list(overrides)))


def flat(values, prefix=""):
    """Dotted key -> repr of the value; repr tells 1 from 1.0 and from True."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = repr(value)
    return found


def valid_config(stage, changes=()):
    """A configuration of `stage` that passes every check, with dotted keys changed."""
    config = STAGES[stage]()
    for key, value in {
        "dataset.path": "rows.jsonl",
        "model.path": "model",
        **dict(changes),
    }.items():
        parent, _, name = key.rpartition(".")
        setattr(attrgetter(parent)(config) if parent else config, name, value)
    if isinstance(config, PPOStageConfig) and not (config.scorer.path or config.scorer.components):
        config.scorer.path = "reward_model"
    return config


def several(*components, **values):
    """Changes that give the PPO stage several scorers."""
    parts = [ScorerComponent(**component) for component in components]
    return {"scorer.components": parts} | {f"scorer.{k}": v for k, v in values.items()}


# --- YAML and dataclass ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_without_overrides_equals_the_dataclass_defaults(stage):
    composed = flat(dataclasses.asdict(compose_stage(stage)))
    assert composed == flat(dataclasses.asdict(STAGES[stage]()))


@pytest.mark.parametrize(
    "overrides, section, expected",
    [
        (["peft=lora"], "peft", {"enabled": True}),
        (["tracker=wandb"], "tracker", {"name": "wandb"}),
        (["scorer=python"], "scorer", {"path": "python:", "normalize": "none"}),
    ],
)
def test_group_changes_only_what_it_is_for(overrides, section, expected):
    composed = dataclasses.asdict(compose_stage("ppo", *overrides))
    wanted = dataclasses.asdict(PPOStageConfig())
    wanted[section] |= expected
    assert flat(composed) == flat(wanted)


def test_every_dataset_group_names_an_existing_format():
    from rlhf.data.formats import FORMATS

    groups = sorted(path.stem for path in (CONF_DIR / "dataset").glob("*.yaml"))
    assert "messages" in groups
    for group in groups:
        assert compose_stage("ppo", f"dataset={group}").dataset.format in FORMATS, group


KNOB_FILES = [
    *sorted(CONF_DIR.glob("*.yaml")),
    *(p for g in ("model", "scorer", "peft", "tracker") for p in sorted((CONF_DIR / g).glob("*"))),
]


def uncommented(text):
    """Knobs with no comment above them or above the unbroken block of lines they stand in."""
    covered, in_defaults, found = False, False, []
    for line in text.splitlines():
        if not line.strip():
            covered = in_defaults = False
        elif line.startswith("defaults:"):
            in_defaults = True
        elif line.lstrip().startswith("#"):
            covered = True
        elif not in_defaults and line.partition(":")[2] and not covered:
            found.append(line.strip())
    return found


def test_knob_without_a_comment_is_found():
    text = "# of a and b\na: 1\nb: 2\n\nc: 3\ngroup:\n  d: 4\n"
    assert uncommented(text) == ["c: 3", "d: 4"]


@pytest.mark.parametrize("path", KNOB_FILES, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_knob_in_the_yaml_has_a_comment(path):
    assert uncommented(path.read_text()) == []


# --- Checks ---------------------------------------------------------------------------------------

PYTHON_SCORER = {"scorer.path": "python:my_module.score"}
OFF_POLICY = "or set ppo.allow_off_policy_sampling=true"

# stage, changes, what the message must say
BAD_VALUES = [
    ("sft", {"model.dtype": "fp16"}, "model.dtype must be one of auto, float32, bfloat16, float16"),
    ("sft", {"model.quantization": "int8"}, "model.quantization must be one of 8bit, 4bit"),
    ("sft", {"model.quantization": "8bit"}, "only adapters on them; set peft=lora, or model.quant"),
    (
        "sft",
        {"model.quantization": "4bit", "peft.enabled": True, "model.path": None}
        | {"model.config": {"a": 1}, "model.tokenizer": "gpt2"},
        "model.config builds a model with random ones; set model.path, or model.quantization=null",
    ),
    (
        "sft",
        {"model.config": {"a": 1}},
        "model.config={'a': 1} builds a model with random weights, but model.path=model loads a "
        "trained one; set model.path=null, or remove model.config (if a recipe sets it: "
        "~model.config.a)",
    ),
    ("reward", {"model.config": {"a": 1}}, "but model.path=model loads a trained one; remove mod"),
    ("ppo", {"model.config": {"a": 1}}, "but model.path=model loads a trained one; remove model."),
    ("sft", {"model.dropout": 1.0}, "model.dropout must lie in [0, 1), got 1.0"),
    ("ppo", {"model.dropout": 0.1}, "model.dropout=0.1: PPO uses no dropout, because its"),
    ("sft", {"model.special_tokens": ["", "a"]}, "model.special_tokens must be distinct, non-"),
    ("sft", {"model.stop_strings": ["a", "a"]}, "model.stop_strings must be distinct, non-"),
    (
        "sft",
        {"model.eos_token": "### End", "model.pad_token": "### End"},
        "model.pad_token='### End' equals model.eos_token, but PPO never samples the pad token",
    ),
    (
        "sft",
        {"model.attn_implementation": "flash"},
        "must be one of eager, sdpa, flash_attention_2",
    ),
    (
        "sft",
        {"model.attn_implementation": "flash_attention_2"},
        "model.attn_implementation=flash_attention_2 needs flash-attn, which is not installed",
    ),
    (
        "sft",
        {"model.path": ".", "model.revision": "main"},
        "model.revision=main applies to Hub models, but model.path=. is a local directory",
    ),
    ("sft", {"precision": "fp16"}, "precision must be one of auto, float32, bfloat16, got 'fp16'"),
    ("sft", {"resume": "yes"}, "resume must be one of true, false, auto, got 'yes'"),
    ("sft", {"checkpoint.every": 0}, "checkpoint.every must be >= 1, got 0"),
    ("sft", {"checkpoint.keep_last": 0}, "checkpoint.keep_last must be >= 1, got 0"),
    (
        "sft",
        {"checkpoint.grace_seconds": 0.0},
        "checkpoint.grace_seconds must lie in (0, 31536000], got 0.0",
    ),
    (
        "ppo",
        {"checkpoint.grace_seconds": float("nan")},
        "grace_seconds must be a finite number, got nan",
    ),
    ("sft", {"checkpoint.grace_seconds": 1e9}, "must lie in (0, 31536000], got 1000000000.0"),
    ("sft", {"tracker.name": "mlflow"}, "tracker.name must be one of none, wandb, got 'mlflow'"),
    ("sft", {"tracker.mode": "off"}, "tracker.mode must be one of online, offline, disabled"),
    (
        "sft",
        {"dataset.eval_fraction": 1.0},
        "dataset.eval_fraction must lie in [0, 0.9], got 1.0",
    ),
    ("sft", {"dataset.max_length": 1}, "dataset.max_length must be >= 2, got 1"),
    ("sft", {"dataset.max_rows": 0}, "dataset.max_rows must be >= 1, got 0"),
    ("sft", {"dataset.max_eval_rows": 0}, "dataset.max_eval_rows must be >= 1, got 0"),
    ("sft", {"peft.r": 0}, "peft.r must be >= 1, got 0"),
    ("sft", {"peft.dropout": 1.1}, "peft.dropout must lie in [0, 1], got 1.1"),
    ("sft", {"peft.train_new_tokens": "maybe"}, "peft.train_new_tokens must be one of true, false"),
    ("sft", {"run_name": "a/b"}, "run_name must be one folder name, got 'a/b'"),
    ("sft", {"run_name": ""}, "run_name must be one folder name, got ''"),
    ("sft", {"run_name": ".."}, "run_name must be one folder name, got '..'"),
    ("sft", {"num_samples": -1}, "num_samples must be >= 0, got -1"),
    ("sft", {"response_length": 0}, "response_length must be >= 1, got 0"),
    ("sft", {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ("sft", {"top_p": 0.0}, "top_p must lie in (0, 1], got 0.0"),
    ("sft", {"mix.fraction": -0.1}, "mix.fraction must lie in [0, 0.9], got -0.1"),
    ("sft", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    (
        "sft",
        {"batch_size": 128, "trainer": {"gradient_accumulation_steps": 16}},
        "batch_size=128 sets trainer.gradient_accumulation_steps, which is 16; leave that at 1, or",
    ),
    ("reward", {"dataset.split_long": True}, "dataset.split_long=true splits conversations of SFT"),
    ("ppo", {"dataset.split_long": True}, "dataset.split_long=true splits conversations of SFT"),
    (
        "reward",
        {"batch_size": 64, "reward.tokens_per_batch": 4096},
        "batch_size=64 counts prompts, but reward.tokens_per_batch=4096 puts as many as fit into",
    ),
    ("reward", {"reward.loss": "hinge"}, "reward.loss must be one of pairwise, plackett_luce, got"),
    (
        "reward",
        {"reward.num_normalization_prompts": 0},
        "reward.num_normalization_prompts must be >= 1, got 0",
    ),
    (
        "reward",
        {"normalization.completions": "best"},
        "normalization.completions must be one of samples, demonstrations, ranked, got 'best'",
    ),
    (
        "reward",
        {"normalization.response_length": 0},
        "normalization.response_length must be >= 1, got 0",
    ),
    ("reward", {"reward.tokens_per_batch": 0}, "reward.tokens_per_batch must be >= 1, got 0"),
    ("reward", {"reward.margin": -1.0}, "reward.margin must be >= 0, got -1.0"),
    ("reward", {"reward.margin_scale": -1.0}, "reward.margin_scale must be >= 0, got -1.0"),
    ("reward", {"reward.center_coef": -0.1}, "reward.center_coef must be >= 0, got -0.1"),
    (
        "reward",
        {"reward.label_smoothing": 0.5},
        "reward.label_smoothing must lie in [0, 0.5), got 0.5",
    ),
    (
        "reward",
        {"reward.loss": "plackett_luce", "reward.label_smoothing": 0.1},
        "set it to 0, or reward.loss=pairwise",
    ),
    ("reward", {"peft.r": 0}, "peft.r must be >= 1, got 0"),
    ("ppo", {"ppo.save_rollouts": 0}, "ppo.save_rollouts must be >= 1, got 0"),
    ("ppo", {"ppo.num_updates": 0}, "ppo.num_updates must be >= 1, got 0"),
    ("ppo", {"ppo.num_ppo_epochs": 0}, "ppo.num_ppo_epochs must be >= 1, got 0"),
    ("ppo", {"ppo.batch_size": 0}, "ppo.batch_size must be >= 1, got 0"),
    ("ppo", {"ppo.num_mini_batches": 0}, "ppo.num_mini_batches must be >= 1, got 0"),
    ("ppo", {"ppo.micro_batch_size": 0}, "ppo.micro_batch_size must be >= 1, got 0"),
    ("ppo", {"ppo.rollout_batch_size": 0}, "ppo.rollout_batch_size must be >= 1, got 0"),
    ("ppo", {"ppo.response_length": 0}, "ppo.response_length must be >= 1, got 0"),
    ("ppo", {"ppo.max_prompt_length": 0}, "ppo.max_prompt_length must be >= 1, got 0"),
    ("ppo", {"scorer.batch_size": 0}, "scorer.batch_size must be >= 1, got 0"),
    ("ppo", {"evaluation.every": 0}, "evaluation.every must be >= 1, got 0"),
    ("ppo", {"ppo.samples_per_prompt": 0}, "ppo.samples_per_prompt must be >= 1, got 0"),
    ("ppo", {"ppo.kl_horizon": 0}, "ppo.kl_horizon must be >= 1, got 0"),
    (
        "sft",
        {"dataset.on_bad_row": "skip"},
        "dataset.on_bad_row must be one of drop, stop, got 'skip'",
    ),
    ("ppo", {"ptx.batch_size": 0}, "ptx.batch_size must be >= 1, got 0"),
    ("ppo", {"ptx.max_length": 1}, "ptx.max_length must be >= 2, got 1"),
    ("ppo", {"ptx.coef": -1.0}, "ptx.coef must be >= 0, got -1.0"),
    ("ppo", {"ppo.entropy_coef": -1.0}, "ppo.entropy_coef must be >= 0, got -1.0"),
    ("ppo", {"evaluation.select_kl_coef": -1.0}, "evaluation.select_kl_coef must be >= 0, got"),
    ("ppo", {"ppo.weight_decay": -0.1}, "ppo.weight_decay must be >= 0, got -0.1"),
    ("ppo", {"ppo.lr_warmup_updates": -1}, "ppo.lr_warmup_updates must be >= 0, got -1"),
    ("ppo", {"ppo.lr_warmup_start": 1.5}, "ppo.lr_warmup_start must lie in [0, 1], got 1.5"),
    ("ppo", {"ppo.adam_betas": [0.9]}, "ppo.adam_betas must be two numbers in [0, 1), e.g. [0.9"),
    ("ppo", {"ppo.adam_betas": [0.9, 1.0]}, "two numbers in [0, 1), e.g. [0.9, 0.95], got [0.9, 1"),
    (
        "ppo",
        {
            "ppo.mask_truncated": True,
            "ppo.whiten_rewards": True,
            "ppo.advantage": "rloo",
            "ppo.samples_per_prompt": 2,
        },
        "ppo.mask_truncated=true and ppo.whiten_rewards=true give truncated responses no rewards, "
        "but "
        "ppo.advantage=rloo compares other responses with them; set ppo.whiten_rewards=false",
    ),
    (
        "ppo",
        {"ppo.scale_scores": True, "ppo.whiten_scores": True},
        "ppo.scale_scores and ppo.whiten_scores both set the scale of the scores; set one to false",
    ),
    (
        "ppo",
        several({"path": "a"}, {"path": "b", "gate": 15.0}),
        "scorer.components[1].gate must lie in (0, 1), got 15.0",
    ),
    (
        "ppo",
        several({"path": "a", "gate": 0.15}),
        "scorer.components: all of them have a gate, [0.15]; the responses that pass every gate",
    ),
    ("ppo", {"ppo.kl_target": 0.0}, "ppo.kl_target must be > 0, got 0.0"),
    ("ppo", {"ppo.clip_scores": 0.0}, "ppo.clip_scores must be > 0, got 0.0"),
    ("ppo", {"ppo.dual_clip": 1.0}, "ppo.dual_clip must be > 1, got 1.0"),
    ("ppo", {"ppo.ema_decay": 1.0}, "ppo.ema_decay must lie in (0, 1), got 1.0"),
    ("ppo", {"preflight": "maybe"}, "preflight must be one of true, false, only, got 'maybe'"),
    ("ppo", {"ppo.kl_in": "score"}, "ppo.kl_in must be one of reward, loss, got 'score'"),
    ("ppo", {"ppo.advantage": "vtrace"}, "ppo.advantage must be one of gae, rloo, grpo, reinforce"),
    ("ppo", {"evaluation.select": "best"}, "evaluation.select must be one of score_minus_kl, ind"),
    ("ppo", {"watchdog.first_ratio": 0.0}, "watchdog.first_ratio must be > 0, got 0.0"),
    ("ppo", {"watchdog.negative_kl": -1.0}, "watchdog.negative_kl must be > 0, got -1.0"),
    ("ppo", {"watchdog.kl_budget": 0.0}, "watchdog.kl_budget must be > 0, got 0.0"),
    ("ppo", {"watchdog.score_std": 0.0}, "watchdog.score_std must be > 0, got 0.0"),
    ("ppo", {"watchdog.grad_norm": 0.0}, "watchdog.grad_norm must be > 0, got 0.0"),
    ("ppo", {"watchdog.sampler_gap": 0.0}, "watchdog.sampler_gap must be > 0, got 0.0"),
    ("ppo", {"watchdog.ratio": 1.0}, "watchdog.ratio must be > 1, got 1.0"),
    ("ppo", {"watchdog.length_drift": 0.5}, "watchdog.length_drift must be > 1, got 0.5"),
    ("ppo", {"watchdog.clip_fraction": 1.5}, "watchdog.clip_fraction must lie in [0, 1], got 1.5"),
    ("ppo", {"watchdog.entropy_drop": -1.0}, "watchdog.entropy_drop must lie in [0, 1], got -1.0"),
    ("ppo", {"watchdog.eos_rate": 1.1}, "watchdog.eos_rate must lie in [0, 1], got 1.1"),
    ("ppo", {"watchdog.explained_variance": 1.0}, "watchdog.explained_variance must be < 1, got"),
    (
        "ppo",
        {"ppo.samples_per_prompt": 3},
        "ppo.batch_size must be divisible by ppo.samples_per_prompt, got 64 and 3",
    ),
    ("ppo", {"ppo.advantage": "rloo"}, "compares the responses of one prompt, but ppo.samples_per"),
    (
        "ppo",
        {"ppo.target_kl": 0.1, "ppo.num_ppo_epochs": 1},
        "ppo.target_kl=0.1 has nothing to skip with one optimiser step per update",
    ),
    ("ppo", {"ppo.kl_in": "loss"}, "has an expected gradient of 0; use ppo.kl_estimator=k3"),
    ("ppo", {"ppo.kl_target": 6.0, "ppo.kl_coef": 0.0}, "by multiplying it, but ppo.kl_coef is 0"),
    (
        "ppo",
        {"evaluation.select": "independent_score"},
        "evaluation.select=independent_score needs evaluation.scorer",
    ),
    (
        "ppo",
        {"critic.warmup_updates": 2, "ppo.advantage": "reinforce_pp"},
        "critic.warmup_updates=2: ppo.advantage=reinforce_pp has no critic to warm up; set it to 0",
    ),
    ("ppo", {"ppo.kl_coef": -0.1}, "ppo.kl_coef must be >= 0, got -0.1"),
    ("ppo", {"ppo.kl_coef": float("nan")}, "ppo.kl_coef must be a finite number, got nan"),
    ("ppo", {"ppo.top_k": -1}, "ppo.top_k must be >= 0, got -1"),
    ("ppo", {"ppo.vf_coef": -1.0}, "ppo.vf_coef must be >= 0, got -1.0"),
    ("ppo", {"ppo.learning_rate": -1e-6}, "ppo.learning_rate must be >= 0, got -1e-06"),
    ("ppo", {"critic.learning_rate": -1.0}, "critic.learning_rate must be >= 0, got -1.0"),
    ("ppo", {"critic.warmup_updates": -1}, "critic.warmup_updates must be >= 0, got -1"),
    ("ppo", {"evaluation.num_prompts": -1}, "evaluation.num_prompts must be >= 0, got -1"),
    ("ppo", {"ppo.temperature": 0.0}, "ppo.temperature must be > 0, got 0.0"),
    ("ppo", {"ppo.adam_epsilon": 0.0}, "ppo.adam_epsilon must be > 0, got 0.0"),
    ("ppo", {"ppo.max_grad_norm": 0.0}, "ppo.max_grad_norm must be > 0, got 0.0"),
    ("ppo", {"ppo.cliprange": 0.0}, "ppo.cliprange must be > 0, got 0.0"),
    ("ppo", {"ppo.cliprange_value": -0.2}, "ppo.cliprange_value must be > 0, got -0.2"),
    ("ppo", {"ppo.target_kl": 0.0}, "ppo.target_kl must be > 0, got 0.0"),
    ("ppo", {"ppo.gamma": 1.5}, "ppo.gamma must lie in [0, 1], got 1.5"),
    ("ppo", {"ppo.lam": -0.5}, "ppo.lam must lie in [0, 1], got -0.5"),
    ("ppo", {"ppo.kl_estimator": "k4"}, "ppo.kl_estimator must be one of k1, k2, k3, got 'k4'"),
    ("ppo", {"ppo.lr_schedule": "cosine"}, "ppo.lr_schedule must be one of linear, constant, got"),
    ("ppo", {"scorer.normalize": "shift"}, "scorer.normalize must be one of demo_mean_zero, stand"),
    (
        "ppo",
        several({"path": "a", "normalize": "zero"}),
        "scorer.components[0].normalize must be one of demo_mean_zero, standardise, none, null",
    ),
    ("ppo", {"scorer.combine": "median"}, "scorer.combine must be one of weighted_sum, mean, min,"),
    ("ppo", {"scorer.std_coef": -1.0}, "scorer.std_coef must be >= 0, got -1.0"),
    (
        "ppo",
        several({"path": "a"}, path="b"),
        "scorer.path=b and scorer.components exclude each other; make the former one of the",
    ),
    (
        "ppo",
        several({"path": "a"}, combine="min"),
        "scorer.combine=min combines several scorers, but scorer.components names 1; name at least",
    ),
    (
        "ppo",
        several({"path": "a", "weight": 0.0}),
        "scorer.components: no weight may be 0, got [0.0]",
    ),
    (
        "ppo",
        several({"path": "a", "weight": 2.0}, {"path": "b"}, combine="mean"),
        "scorer.combine=mean ignores weights, got [2.0, 1.0]; leave them at 1",
    ),
    (
        "ppo",
        several({"path": "runs/a/reward/final"}, {"path": "other/a"}),
        "scorer.components must have distinct names of letters, digits and _.-, got a, a; set name",
    ),
    ("ppo", several({"path": "a", "name": "a/b"}), "of letters, digits and _.-, got a/b; set name"),
    (
        "ppo",
        several({"path": "python:m.f"}, {"path": "b"}),
        "critic.init=reward needs a reward model, but scorer.path is a Python function",
    ),
    (
        "ppo",
        {"critic.init": "random"},
        "critic.init must be reward, policy, or the directory of a trained critic "
        "(runs/<run_name>/ppo/critic), got 'random'",
    ),
    (
        "ppo",
        {"ppo.num_mini_batches": 3},
        "ppo.batch_size must be divisible by ppo.num_mini_batches, got 64 and 3",
    ),
    ("ppo", {"ppo.top_p": 0.9}, OFF_POLICY),
    ("ppo", {"ppo.top_k": 50}, OFF_POLICY),
    (
        "ppo",
        {"ppo.top_p": 0.0, "ppo.allow_off_policy_sampling": True},
        "ppo.top_p must lie in (0, 1], got 0.0",
    ),
    ("ppo", PYTHON_SCORER, "scorer.path is a Python function: set critic.init=policy"),
]


MISSING_VALUES = [
    ("sft", {"dataset.path": None}, "dataset.path: file or Hub name of the rows, e.g."),
    ("sft", {"model.path": None}, "model.path: Hub id or directory, e.g."),
    ("sft", {"model.path": None}, "model.tokenizer: Hub id or directory; needed when"),
    ("sft", {"mix.fraction": 0.1}, "mix.path: file or Hub name of the text"),
    ("reward", {"model.path": None}, "model.path: runs/run/sft/final does not exist; run `python "),
    ("reward", {"normalization.completions": "demonstrations"}, "normalization.path: file or Hub"),
    ("ppo", {"ptx.coef": 1.0}, "ptx.path: file or Hub name of the text"),
    ("ppo", {"scorer.path": "python:"}, "scorer.path: a function, e.g. scorer.path=python:my_"),
    ("ppo", several({"path": "a"}, {}), "missing values:\n  scorer.components[1].path: the final/"),
]


@pytest.mark.parametrize(
    "stage, changes, message", BAD_VALUES + MISSING_VALUES, ids=lambda x: str(x)[:60]
)
def test_bad_value_is_named_with_what_is_allowed(stage, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check(valid_config(stage, changes))


def messages_of_checks():
    """A pattern for each message that `rlhf.config.checks` yields, read from its source."""
    for node in ast.walk(ast.parse(inspect.getsource(checks))):
        if isinstance(node, ast.Yield):
            parts = getattr(node.value, "values", [node.value])
            yield "".join(
                re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts
            )


def knobs_with_limits(config_class, prefix=""):
    for field in dataclasses.fields(config_class):
        if "group" in field.metadata:
            yield from knobs_with_limits(field.metadata["group"], f"{prefix}{field.name}.")
        elif str(field.metadata.get("limits", "")):
            yield prefix + field.name


def test_every_rule_and_range_is_broken_by_some_row_of_the_table():
    found = []
    for stage, changes, _ in BAD_VALUES + MISSING_VALUES:
        with pytest.raises(InputError) as caught:
            check(valid_config(stage, changes))
        found += [line.strip() for line in str(caught.value).splitlines()]
    assert [p for p in messages_of_checks() if not any(re.fullmatch(p, m) for m in found)] == []
    named = {message.partition(" must ")[0] for message in found}
    knobs = {name for stage in STAGES.values() for name in knobs_with_limits(stage)}
    assert len(knobs) > 75
    assert knobs - named == set()


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("sft", {}),
        ("reward", {}),
        ("ppo", {}),
        ("ppo", {"ppo.top_p": 0.9, "ppo.allow_off_policy_sampling": True}),
        ("ppo", {"ppo.kl_coef": 0.0, "ppo.cliprange_value": None, "ppo.gamma": 0.0}),
        ("ppo", PYTHON_SCORER | {"critic.init": "policy"}),
        ("ppo", several({"path": "runs/a/reward/final"}, {"path": "runs/b/reward/final"})),
        ("ppo", several({"path": "a"}, {"path": "b", "normalize": "none"}, combine="min")),
        ("ppo", several({"path": "a", "weight": -0.5}, {"path": "python:m.f", "name": "x"})),
        ("ppo", several({"path": "a"}, {"path": "b", "gate": 0.15})),
        ("ppo", {"ppo.adam_betas": [0.0, 0.95], "ppo.lr_warmup_updates": 500}),
        ("ppo", PYTHON_SCORER | {"ppo.advantage": "rloo", "ppo.samples_per_prompt": 4}),
        ("ppo", {"ppo.kl_in": "loss", "ppo.kl_estimator": "k3", "resume": "auto"}),
        ("sft", {"model.path": None, "model.config": {"a": 1}, "model.tokenizer": "gpt2"}),
        ("ppo", {"model.quantization": "4bit", "peft.enabled": True}),
        ("reward", {"model.dropout": 0.0}),
    ],
)
def test_good_values_pass(stage, changes):
    check(valid_config(stage, changes))


def test_all_bad_values_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        check(valid_config("ppo", {"ppo.kl_coef": -1.0, "ppo.gamma": 2.0, "peft.r": 0}))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["peft.r", "ppo.kl_coef", "ppo.gamma"]


@pytest.mark.parametrize(
    "stage, keys",
    [
        ("sft", ["dataset.path", "model.path", "model.tokenizer", "mix.path"]),
        ("reward", ["dataset.path", "model.path"]),
        ("ppo", ["dataset.path", "model.path", "scorer.path", "ptx.path"]),
    ],
)
def test_all_missing_values_are_reported_at_once(stage, keys, tmp_path):
    with pytest.raises(InputError) as caught:
        config = STAGES[stage](runs_dir=str(tmp_path), run_name="mine")
        if isinstance(config, PPOStageConfig):
            config.ptx.coef = 1.0
        if isinstance(config, SFTStageConfig):
            config.mix.fraction = 0.05
        check(config)
    title, *lines = str(caught.value).splitlines()
    assert title == "missing values:"
    assert [line.split(":")[0].strip() for line in lines] == keys
    assert all("e.g. " in line or "run_name=mine" in line or "needed" in line for line in lines)


def test_directories_of_the_same_run_stand_in_for_missing_paths(tmp_path):
    for stage in ("sft", "reward"):
        (tmp_path / "mine" / stage / "final").mkdir(parents=True)
    config = PPOStageConfig(runs_dir=str(tmp_path), run_name="mine")
    config.dataset.path = "rows.jsonl"
    check(config)


def test_the_reward_model_of_the_run_does_not_join_the_components(tmp_path):
    (tmp_path / "run/reward/final").mkdir(parents=True)
    config = valid_config("ppo", several({"path": "a"}) | {"runs_dir": str(tmp_path)})
    assert with_default_paths(config).scorer == config.scorer


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("runs/helpful/reward/final", "helpful"),
        ("/data/safe/reward/final/", "safe"),
        ("OpenAssistant/reward-model", "reward-model"),
        ("python:my_module.brevity", "brevity"),
    ],
)
def test_a_component_is_named_by_its_run_or_function(path, label):
    assert ScorerComponent(path).label == label
    assert ScorerComponent(path, name="mine").label == "mine"


def test_components_are_read_from_the_command_line_and_from_a_saved_configuration(tmp_path):
    text = "[{path:runs/helpful/reward/final},{path:python:m.f,weight:-0.5,name:brief}]"
    config = compose_stage("ppo", f"scorer.components={text}")
    expected = [
        ScorerComponent("runs/helpful/reward/final"),
        ScorerComponent("python:m.f", weight=-0.5, name="brief"),
    ]
    assert config.scorer.components == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PPOStageConfig, tmp_path / "config.yaml") == config


# --- Objects and arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformers.TrainingArguments", "trl.SFTConfig"])
def test_typo_among_trainer_arguments_names_the_nearest(name):
    factory = load_object(name, "test")
    with pytest.raises(InputError) as caught:
        build_arguments(factory, {"learning_rat": 1e-3}, {"output_dir": "x"})
    assert f"trainer.learning_rat is not an argument of {factory.__name__}" in str(caught.value)
    assert "Did you mean learning_rate" in str(caught.value)


@dataclasses.dataclass
class Arguments:
    """Stands for a library's argument class."""

    output_dir: str
    steps: int = 1

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps is negative")


def test_trainer_arguments_are_passed_on():
    built = build_arguments(Arguments, {"steps": 5}, {"output_dir": "here"})
    assert built == Arguments("here", 5)


def test_reserved_trainer_argument_is_refused():
    with pytest.raises(InputError, match="trainer.output_dir is set by the stage itself; remove"):
        build_arguments(Arguments, {"output_dir": "there"}, {"output_dir": "here"})


def test_value_that_the_library_refuses_is_an_input_error():
    with pytest.raises(InputError, match="trainer: Arguments refuses these values: steps is neg"):
        build_arguments(Arguments, {"steps": -1}, {"output_dir": "here"})


def test_nearest_says_nothing_without_a_close_name():
    assert nearest("zzz", ["alpha", "beta"]) == ""


@pytest.mark.parametrize(
    "dotted, message",
    [
        ("function", "scorer.path='function' is not a dotted path such as my_module.my_function"),
        ("no_such_module.f", "scorer.path='no_such_module.f' cannot be imported"),
        ("python:math.no_such_name", "scorer.path='python:math.no_such_name' cannot be imported"),
    ],
)
def test_object_that_cannot_be_imported_is_named_with_its_key(dotted, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_object(dotted, "scorer.path")


def test_object_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_user.py").write_text("def score():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nonexistent"])
    assert load_object("python:module_of_the_user.score", "scorer.path")() == 3


# --- Reading and writing --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_saved_configuration_is_read_back_equal(stage, tmp_path):
    config = valid_config(stage, {"seed": 7, "model.config": {"model_type": "llama"}})
    config.peft.target_modules = ["q_proj"]
    if stage != "ppo":
        config.trainer["weight_decay"] = 0.1  # a key that the default lacks
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(STAGES[stage], tmp_path / "config.yaml")
    assert type(loaded) is STAGES[stage]
    assert loaded == config


def test_unknown_key_in_a_saved_configuration_is_named(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("ppo:\n  kl_coeff: 0.1\n")
    with pytest.raises(InputError) as caught:
        load_config(PPOStageConfig, path)
    assert str(path) in str(caught.value)
    assert "unknown key 'ppo.kl_coeff'. Did you mean ppo.kl_coef" in str(caught.value)


def test_wrong_type_in_a_saved_configuration_is_named(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("seed: many\n")
    with pytest.raises(InputError, match="seed: Value 'many' of type 'str' could not be converted"):
        load_config(SFTStageConfig, path)


def test_config_keys_are_all_dotted_keys():
    @dataclasses.dataclass
    class Inner:
        a: int = 1

    @dataclasses.dataclass
    class Outer:
        b: int = 2
        inner: Inner = dataclasses.field(default_factory=Inner)
        free: dict = dataclasses.field(default_factory=lambda: {"c": 3})

    assert config_keys(Outer) == ["b", "inner", "inner.a", "free", "free.c"]
