"""Hashes that tell whether two tokenizers encode and render in the same way."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash vocabulary and special tokens."""
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    return _hash(json.dumps([sorted(tokenizer.get_vocab().items()), special]))


def hash_template(tokenizer: Any) -> str:
    """Hash the chat template; a tokenizer without one hashes like an empty template."""
    return _hash(tokenizer.chat_template or "")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_rendering(tokenizer: Any) -> str:
    """Hash everything that turns a conversation into token ids: vocabulary, special tokens, the
    rules that split text, the chat template.

    A reward model may read a policy's token ids only if both hashes match.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # of the latest call
        rules.pop(state, None)
    facts = [hash_tokenizer(tokenizer), tokenizer.chat_template, rules]
    return _hash(json.dumps(facts, sort_keys=True))
