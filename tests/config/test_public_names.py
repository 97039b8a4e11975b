"""What `from rlhf import` gives.

Run: python -m pytest tests/config/test_public_names.py
"""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

import rlhf
from rlhf.config import STAGES


def test_every_configuration_class_can_be_imported_from_the_top():
    classes = {"ScorerComponent"}
    for stage in STAGES.values():
        classes.add(stage.__name__)
        groups = (f for f in dataclasses.fields(stage) if f.name != "trainer")
        classes |= {f.metadata["group"].__name__ for f in groups if "group" in f.metadata}
    assert classes <= set(rlhf.__all__)


def test_a_star_import_gives_all_names():
    space: dict = {}
    exec("from rlhf import *", space)
    assert set(rlhf.__all__) <= set(space)
    assert all(getattr(rlhf, name) is space[name] for name in rlhf.__all__)


def test_type_checkers_see_what_is_imported():
    """Every name has an import that only type checkers read, from where it is defined."""
    assert Path(rlhf.__file__).with_name("py.typed").is_file()
    tree = ast.parse(Path(rlhf.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(rlhf.__all__)
    for name, module in seen.items():
        assert getattr(__import__(module, fromlist=[name]), name) is getattr(rlhf, name)


@pytest.mark.parametrize(
    ("room", "names"),
    [
        ("rlhf.sft", "SFTResult train_sft"),
        ("rlhf.reward", "RewardResult train_reward"),
        ("rlhf.ppo", "PPOResult PPOTrainer train_ppo"),
        ("rlhf.scorers", "load_scorer"),
        ("rlhf.data", "chat_template_text encode_row encode_sft load_rows stop_strings"),
        ("rlhf.models", "ScalarModel load_policy load_reward_model load_tokenizer response_text"),
    ],
)
def test_scripts_find_names_in_the_rooms_where_they_were(room, names):
    for name in names.split():
        assert callable(getattr(importlib.import_module(room), name)), name
