"""Recipes of the named systems: their published values in the resolved configuration.

The table holds facts of the papers and repositories, not of the YAML files. Left out: training
(test_recipe_runs.py).
Run: python -m pytest tests/recipes/test_recipes.py
"""

import re
from operator import attrgetter

import pytest
from helpers.configs import compose_stage
from transformers import TrainingArguments
from trl import SFTConfig

from rlhf.config import CONF_DIR, STAGES, check
from rlhf.data import resolve_format
from rlhf.hf_trainer import trainer_arguments
from rlhf.tokenizer import chat_template_text

LLAMA_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BAIZE_LAYERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
LORA_BAIZE = {"peft.enabled": True, "peft.r": 8, "peft.alpha": 16, "peft.dropout": 0.05}
SELF_CHAT = {
    "dataset.format": "baize",
    "train_on_prompt": True,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "warmup_steps": 100,
    "batch_size": 64,
}
TO_A_TENTH = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}

DOLLY_TOKENS = {
    "model.special_tokens": ["### End", "### Instruction:", "### Response:\n"],
    "model.eos_token": "### End",
    "model.pad_token": "<|endoftext|>",
    "model.shrink_embeddings": True,
    "top_p": 0.92,
}

# (recipe, stage) -> key -> value. A key without a dot that the stage does not have is one of
# `trainer`.
FACTS = {
    ("alpaca", "sft"): {
        "model.path": "huggyllama/llama-7b",
        "model.chat_template": "alpaca",
        "dataset.path": "tatsu-lab/alpaca",
        "dataset.format": "alpaca",
        "dataset.max_length": 512,
        "train_on_prompt": False,
        "peft.enabled": False,
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "batch_size": 128,
    },
    ("alpaca_lora", "sft"): {
        "model.path": "huggyllama/llama-7b",
        "model.chat_template": "alpaca_nl",
        "model.quantization": "8bit",
        "dataset.path": "tatsu-lab/alpaca",
        "dataset.format": "alpaca",
        "dataset.max_length": 512,
        "dataset.max_eval_rows": 2000,
        "train_on_prompt": True,
        "peft.enabled": True,
        "peft.r": 16,
        "peft.alpha": 16,
        "peft.dropout": 0.05,
        "peft.target_modules": LLAMA_ATTENTION,
        "load_best_model_at_end": True,
        "num_train_epochs": 10,
        "learning_rate": 3e-4,
        "warmup_steps": 100,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 8,
        "eval_steps": 200,
        "checkpoint.every": 200,
        "checkpoint.keep_last": 3,
        "batch_size": 128,
    },
    ("dolly_v1", "sft"): {
        "model.path": "EleutherAI/gpt-j-6b",
        "model.chat_template": "dolly",
        **DOLLY_TOKENS,
        "model.gradient_checkpointing": True,
        "dataset.path": "tatsu-lab/alpaca",
        "dataset.format": "alpaca",
        "dataset.max_length": 1024,
        "train_on_prompt": False,
        "response_length": 256,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 8,
        "batch_size": 64,
    },
    ("dolly_v2", "sft"): {
        "seed": 42,
        "model.path": "EleutherAI/pythia-6.9b",
        "model.chat_template": "dolly",
        **DOLLY_TOKENS,
        "model.gradient_checkpointing": True,
        "dataset.path": "databricks/databricks-dolly-15k",
        "dataset.format": "dolly15k",
        "dataset.max_length": 2048,
        "dataset.max_eval_rows": 200,
        "train_on_prompt": False,
        "num_train_epochs": 2,
        "learning_rate": 5e-6,
        "warmup_steps": 50,
        "per_device_train_batch_size": 6,
        "eval_steps": 50,
        "checkpoint.every": 200,
        "checkpoint.keep_last": 20,
        "batch_size": 48,
    },
    ("vicuna", "sft"): {
        "resume": "auto",
        "model.path": "huggyllama/llama-7b",
        "model.chat_template": "vicuna_v1",
        "model.gradient_checkpointing": True,
        "dataset.path": None,
        "dataset.format": "sharegpt",
        "dataset.max_length": 2048,
        "dataset.split_long": True,
        "dataset.eval_fraction": 0.01,
        "train_on_prompt": False,
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "batch_size": 128,
    },
    ("baize", "sft"): {
        "model.path": "huggyllama/llama-7b",
        "model.chat_template": "baize",
        "model.quantization": "8bit",
        "dataset.max_length": 512,
        "dataset.max_eval_rows": 2000,
        "peft.target_modules": BAIZE_LAYERS,
        **LORA_BAIZE,
        **SELF_CHAT,
    },
    ("falcon_instruct", "sft"): {
        "model.path": "tiiuae/falcon-7b",
        "model.chat_template": "falcon",
        "dataset.max_length": 2048,
        "mix.fraction": 0.05,
        "peft.target_modules": ["query_key_value"],
        **LORA_BAIZE,
        **SELF_CHAT,
    },
    ("chatllama", "sft"): {
        "model.path": "facebook/opt-1.3b",
        "model.chat_template": "chatllama",
        "dataset.format": "chatllama_actor",
        "train_on_prompt": False,
        "num_train_epochs": 1,
        "learning_rate": 9e-6,
        "batch_size": 2,
    },
    ("chatllama", "reward"): {"dataset.format": "chatllama_reward", "learning_rate": 9e-6},
    ("chatllama", "ppo"): {
        "dataset.format": "chatllama_rlhf",
        "ppo.num_updates": 100,
        "ppo.batch_size": 32,
        "ppo.num_mini_batches": 32,
        "ppo.num_ppo_epochs": 1,
        "ppo.learning_rate": 5e-6,
        "ppo.gamma": 1.0,
        "ppo.cliprange": 0.2,
        "ppo.cliprange_value": 0.2,
        "ppo.entropy_coef": 0.02,
        "critic.learning_rate": 9e-6,
    },
    ("alpaca_farm", "sft"): {
        "model.path": "huggyllama/llama-7b",
        "model.chat_template": "alpaca",
        "dataset.format": "alpaca",
        "dataset.max_length": 512,
        "train_on_prompt": False,
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "batch_size": 128,
    },
    ("alpaca_farm", "reward"): {
        "dataset.format": "alpaca_farm",
        "num_train_epochs": 1,
        "learning_rate": 3e-6,
        "batch_size": 16,
    },
    ("alpaca_farm", "ppo"): {
        "dataset.format": "alpaca",
        "ppo.batch_size": 512,
        "ppo.num_mini_batches": 2,
        "ppo.num_ppo_epochs": 2,
        "ppo.num_updates": 80,
        "ppo.max_prompt_length": 192,
        "ppo.response_length": 300,
        "ppo.learning_rate": 1e-5,
        "ppo.lr_warmup_updates": 5,
        "ppo.adam_epsilon": 1e-5,
        "ppo.kl_coef": 0.02,
        "ppo.gamma": 1.0,
        "ppo.lam": 1.0,
        "ppo.vf_coef": 0.1,
        "ppo.cliprange": 0.2,
        "ppo.cliprange_value": 0.2,
        "ppo.whiten_rewards": True,
        "critic.init": "reward",
    },
    ("hh", "sft"): {
        "model.path": None,
        "model.chat_template": "hh",
        "dataset.path": "Anthropic/hh-rlhf",
        "dataset.eval_path": "Anthropic/hh-rlhf",
        "dataset.format": "hh_chosen",
        "train_on_prompt": False,
        "num_train_epochs": 1,
    },
    ("hh", "reward"): {
        "dataset.path": "Anthropic/hh-rlhf",
        "dataset.format": "hh",
        "num_train_epochs": 1,
    },
    ("hh", "ppo"): {
        "dataset.path": "Anthropic/hh-rlhf",
        "dataset.format": "hh",
        "ppo.kl_coef": 0.001,
        "ppo.temperature": 1.0,
    },
    ("tldr", "sft"): {
        "dataset.format": "tldr",
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "batch_size": 128,
    },
    ("tldr", "reward"): {
        "dataset.format": "summarize_from_feedback",
        "num_train_epochs": 1,
        "learning_rate": 1.5e-5,
        "batch_size": 64,
        "normalization.completions": "demonstrations",
    },
    ("tldr", "ppo"): {
        "dataset.format": "tldr",
        "scorer.normalize": "demo_mean_zero",
        "ppo.batch_size": 512,
        "ppo.num_updates": 1_000_000 // 512,
        "ppo.num_ppo_epochs": 4,
        "ppo.learning_rate": 1.5e-5,
        "ppo.lr_schedule": "linear",
        "ppo.kl_coef": 0.05,
        "ppo.gamma": 1.0,
        "ppo.lam": 0.95,
        "ppo.cliprange": 0.2,
    },
    ("instructgpt", "sft"): {
        "dataset.format": "prompt_completion",
        "model.dropout": 0.2,
        "num_train_epochs": 16,
        "learning_rate": 9.65e-6,
        "warmup_steps": 0,
        "batch_size": 32,
        **TO_A_TENTH,
    },
    ("instructgpt", "reward"): {
        "dataset.format": "ranked",
        "reward.loss": "pairwise",
        "num_train_epochs": 1,
        "learning_rate": 9e-6,
        "batch_size": 64,
        "normalization.completions": "demonstrations",
        **TO_A_TENTH,
    },
    ("instructgpt", "ppo"): {
        "dataset.format": "prompt_completion",
        "scorer.normalize": "demo_mean_zero",
        "ppo.num_updates": 256_000 // 512,
        "ppo.batch_size": 512,
        "ppo.num_mini_batches": 512 // 64,
        "ppo.num_ppo_epochs": 1,
        "ppo.kl_coef": 0.02,
        "ppo.lr_schedule": "constant",
        "ppo.lr_warmup_updates": 10,
        "ppo.lr_warmup_start": 0.1,
        "ppo.adam_betas": [0.9, 0.95],
        "ppo.gamma": 1.0,
        "ppo.cliprange": 0.2,
        "ppo.temperature": 1.0,
        "ppo.ema_decay": 0.992,
        "ptx.coef": 27.8,
        "ptx.batch_size": 8 * 64,
        "critic.init": "reward",
        "critic.learning_rate": 9e-6,
    },
    ("llama2_chat", "sft"): {
        "model.path": "meta-llama/Llama-2-7b-hf",
        "model.chat_template": "llama2",
        "dataset.format": "messages",
        "dataset.max_length": 4096,
        "train_on_prompt": False,
        "num_train_epochs": 2,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "packing": True,
        "batch_size": 64,
    },
    ("llama2_chat", "reward"): {
        "dataset.format": "pair",
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "warmup_steps": 0.03,
        "batch_size": 512,
    },
    ("llama2_chat", "ppo"): {
        "dataset.format": "prompt_completion",
        "ppo.batch_size": 512,
        "ppo.num_mini_batches": 512 // 64,
        "ppo.num_ppo_epochs": 1,
        "ppo.num_updates": 400,
        "ppo.kl_coef": 0.01,
        "ppo.learning_rate": 1e-6,
        "ppo.lr_schedule": "constant",
        "ppo.adam_betas": [0.9, 0.95],
        "ppo.weight_decay": 0.1,
        "ppo.whiten_scores": True,
        "ppo.adam_epsilon": 1e-5,
        "ppo.max_grad_norm": 1.0,
        "ppo.cliprange": 0.2,
    },
}
each = pytest.mark.parametrize("recipe, stage", FACTS)


def resolved(config, key):
    if "." in key or hasattr(config, key):
        return attrgetter(key)(config)
    return config.trainer[key]


@each
def test_recipe_has_the_published_values(recipe, stage):
    config = compose_stage(stage, f"recipe={recipe}")
    expected = FACTS[recipe, stage]
    assert {key: resolved(config, key) for key in expected} == expected
    assert config.run_name == recipe


def test_the_table_covers_every_recipe_and_stage_and_no_other():
    parts = (CONF_DIR / "recipe/parts").glob("*.yaml")
    stages = {tuple(file.stem.rsplit("_", 1)) for file in parts}
    assert stages - {("demo", stage) for stage in STAGES} == set(FACTS)
    assert {file.stem for file in (CONF_DIR / "recipe").glob("*.yaml")} == {
        "demo",
        *(recipe for recipe, _ in FACTS),
    }


@each
def test_recipe_passes_the_checks_and_the_libraries_know_its_arguments(recipe, stage):
    config = compose_stage(stage, f"recipe={recipe}")
    config.dataset.path = config.dataset.path or "rows.json"
    config.model.path = config.model.path or "model"
    if stage == "sft":
        config.mix.path = "text.jsonl"
    if stage == "reward":
        config.normalization.path = "demonstrations.jsonl"
    if stage == "ppo":
        config.scorer.path = None if config.scorer.components else "reward_model"
        config.ptx.path = "text.jsonl"
    check(config)
    resolve_format(config.dataset.format)
    if config.model.chat_template is not None:
        chat_template_text(config.model.chat_template)
    if stage != "ppo":
        trainer_arguments(SFTConfig if stage == "sft" else TrainingArguments, config, stage)


@each
def test_later_stages_take_the_model_of_the_first_and_expect_its_template(recipe, stage):
    first, config = (compose_stage(name, f"recipe={recipe}") for name in ("sft", stage))
    assert stage == "sft" or config.model.path is None
    assert config.model.chat_template == first.model.chat_template


@each
def test_the_users_data_set_format_wins_over_the_recipes(recipe, stage):
    config = compose_stage(stage, f"recipe={recipe}", "dataset=ultrafeedback", "run_name=x")
    assert config.dataset.format == "ultrafeedback" and config.run_name == "x"


def test_the_user_can_switch_the_recipes_lora_off_and_change_single_values():
    overrides = ["peft=none", "trainer.learning_rate=1e-4", "model.path=huggyllama/llama-13b"]
    config = compose_stage("sft", "recipe=baize", *overrides)
    assert not config.peft.enabled
    assert config.trainer["learning_rate"] == 1e-4 and config.trainer["warmup_steps"] == 100
    assert config.model.path == "huggyllama/llama-13b"


VARIANTS = [
    (file.stem, stage, words)
    for file in sorted((CONF_DIR / "recipe").glob("*.yaml"))
    for stage, words in re.findall(
        r"^#   [\w.,' ]*\b(sft|reward|ppo): (.*=.*)", file.read_text(), re.M
    )
]


@pytest.mark.parametrize("recipe, stage, words", VARIANTS)
def test_variants_in_the_comments_of_recipes_compose_and_change_something(recipe, stage, words):
    varied = compose_stage(stage, f"recipe={recipe}", *words.split())
    for word in words.split():
        key = word.partition("=")[0].removeprefix("trainer.")
        assert resolved(varied, key) != resolved(compose_stage(stage, f"recipe={recipe}"), key)


def test_every_model_size_of_the_papers_has_a_variant():
    assert {(recipe, words) for recipe, _, words in VARIANTS} >= {
        (
            "alpaca",
            "model.path=huggyllama/llama-13b trainer.num_train_epochs=5 trainer.learning_rate=1e-5",
        ),
        ("alpaca", "model.path=facebook/opt-6.7b"),
        ("baize", "model.path=huggyllama/llama-13b trainer.learning_rate=1e-4"),
        ("baize", "model.path=huggyllama/llama-30b trainer.learning_rate=5e-5"),
        ("dolly_v2", "model.path=EleutherAI/pythia-12b"),
        ("vicuna", "model.path=huggyllama/llama-13b"),
        ("falcon_instruct", "model.path=tiiuae/falcon-40b"),
    }


COMMANDS = [
    (stage, words)
    for file in [CONF_DIR.parent / "README.md", *sorted((CONF_DIR / "recipe").glob("*.yaml"))]
    for stage, words in re.findall(
        r"python -m rlhf\.(sft|reward|ppo) +(recipe=[^`\n]*)", file.read_text(encoding="utf-8")
    )
]


@pytest.mark.parametrize("stage, words", COMMANDS)
def test_commands_shown_for_recipes_compose_and_pass_the_checks(stage, words):
    config = compose_stage(stage, *words.split())
    if stage != "sft":
        config.model.path = config.model.path or "what the run's sft stage left"
    if stage == "ppo" and not config.scorer.components:
        config.scorer.path = "what the run's reward stage left"
    check(config)


def test_every_recipe_has_a_command_on_its_page():
    shown = re.findall(r"recipe=(\w+)", (CONF_DIR.parent / "docs/recipes.md").read_text("utf-8"))
    assert set(shown) >= {recipe for recipe, _ in FACTS}
