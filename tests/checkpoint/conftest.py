"""Fixtures of the tests of checkpoints."""

import pytest
from helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer
