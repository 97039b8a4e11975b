"""Two reward models that share tokenizer and template with `policy_tokenizer`."""

import pytest
from helpers.scorers import policy_tokenizer, write_reward_model


@pytest.fixture(scope="session")
def helpful(tmp_path_factory) -> str:
    """A reward model of the Llama family."""
    return write_reward_model(tmp_path_factory.mktemp("helpful"), policy_tokenizer(), seed=1)


@pytest.fixture(scope="session")
def safe(tmp_path_factory) -> str:
    """A reward model of another family."""
    return write_reward_model(
        tmp_path_factory.mktemp("safe"), policy_tokenizer(), seed=2, family="gpt_neox"
    )
