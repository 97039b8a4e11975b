"""Token ids: of a text, those that a policy never emits, and hashes of all that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rlhf.config import InputError

if TYPE_CHECKING:  # commands import this room before they need torch
    from torch import Tensor

NUM_CONTEXT_CHARACTERS = 64  # of the text before; no token is longer


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text alone, without BOS and EOS."""
    # verbose: no warning about model_max_length; our own limits drop and count.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def first_token_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text at the start of a sequence: after BOS where the tokenizer adds one."""
    ids = token_ids(text, tokenizer)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def next_token_ids(start: str, text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that follows `start`: the ids that it has in the whole, because servers
    tokenise the whole; its ids alone where a token of the whole would reach across.

    SentencePiece writes a space before the first text: "Yo" is "_Yo" alone, "Yo" after a newline.
    """
    if start and _first_token_differs(tokenizer):
        context = start[-NUM_CONTEXT_CHARACTERS:]
        before, whole = token_ids(context, tokenizer), token_ids(context + text, tokenizer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return token_ids(text, tokenizer)


@lru_cache(maxsize=32)
def _first_token_differs(tokenizer: Any) -> bool:
    """True where a text has other ids at the start of a sequence than after another text.

    Phi-3's tokens take the whitespace after them (`rstrip`).
    """
    if any(token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return True
    return any(
        token_ids(start + "a", tokenizer) != token_ids(start, tokenizer) + token_ids("a", tokenizer)
        for start in ("\n", ":", tokenizer.eos_token or ":")
    )


def with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """Append EOS, unless the ids end with it."""
    require_eos(tokenizer)
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


def require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so a response could never end; set one")


def num_tokens(tokenizer: Any) -> int:
    """Rows that an embedding table needs: the largest id + 1. Ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def forbidden_token_ids(tokenizer: Any, num_logits: int, stop_ids: Collection[int] = ()) -> Tensor:
    """Ids that a policy never emits: a pad token that is neither EOS nor one of the `stop_ids`, and
    the padded rows of the embedding table.

    Their logits (`num_logits` of the head) become -inf both in sampling and in every log-prob.
    """
    import torch

    ids = set(range(num_tokens(tokenizer), num_logits))
    if tokenizer.pad_token_id not in (tokenizer.eos_token_id, *stop_ids):
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids), dtype=torch.long)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokenizer(tokenizer: Any, **replaced: str | None) -> str:
    """Hash vocabulary and special tokens, as if those `replaced` were others, e.g. `pad_token`."""
    tokens = tokenizer.special_tokens_map | replaced
    special = sorted((key, str(value)) for key, value in tokens.items())
    return _hash(json.dumps([sorted(tokenizer.get_vocab().items()), special]))


def hash_template(tokenizer: Any) -> str:
    """Hash the chat template; a tokenizer without one hashes like an empty template."""
    return _hash(tokenizer.chat_template or "")


def hash_rendering(tokenizer: Any) -> str:
    """Hash everything that turns a conversation into token ids, with the rules that split text.

    A reward model may read a policy's token ids only if both hashes match. The pad token does not
    matter: a reward model may have another one (`pad_with_no_stop_id`).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # of the latest call
        rules.pop(state, None)
    rules["added_tokens"] = [
        token
        for token in rules.get("added_tokens", [])
        if not (token["single_word"] and token["content"] == tokenizer.pad_token)
    ]
    facts = [hash_tokenizer(tokenizer, pad_token=None), tokenizer.chat_template, rules]
    return _hash(json.dumps(facts, sort_keys=True))
