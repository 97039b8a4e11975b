"""Token ids of a text: at the start of a sequence, after other text, with EOS."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rlhf.config import InputError

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

    SentencePiece writes a space before it; Phi-3's tokens take whitespace after them (`rstrip`).
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
    """Refuse a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so a response could never end; set one")
