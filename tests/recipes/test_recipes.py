"""Recipes of the named systems: their published values in the resolved configuration.

The table (helpers/recipe_facts.py) holds facts of the papers and repositories. Left out: training
(test_recipe_runs.py).
Run: python -m pytest tests/recipes/test_recipes.py
"""

import re
from operator import attrgetter

import pytest
from helpers.configs import compose_stage
from helpers.recipe_facts import FACTS
from transformers import TrainingArguments
from trl import SFTConfig

from rlhf.config import CONF_DIR, STAGES, check
from rlhf.data import resolve_format
from rlhf.hf_trainer import trainer_arguments
from rlhf.tokenizer import chat_template_text

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


def test_tests_that_the_page_names_exist():
    root = CONF_DIR.parent
    page = (root / "docs/recipes.md").read_text("utf-8")
    assert len(re.findall(r"^\| .*`tests/", page, re.M)) >= 10
    file = ""
    for named, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page):
        file = named or file  # `::name` is in the file that was named last
        if file:
            text = (root / file).read_text("utf-8")
            assert not test or f"\ndef {test}(" in text, f"{file} has no {test}"
