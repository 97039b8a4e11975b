"""Sampled ids as text: what ends an answer besides EOS, and what of it is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.tokenizer.rendering import answer_frame
from rlhf.tokenizer.templates import stop_strings


class StopStrings:
    """Tells when a response that grows token by token has come to a stop string.

    Attributes:
        strings: those that the tokenizer's chat template declares.
    """

    def __init__(self, tokenizer: Any):
        self.strings, self._tokenizer = stop_strings(tokenizer), tokenizer
        self._can_end: dict[int, bool] = {}

    def end(self, ids: Sequence[int]) -> bool:
        """True where the text of a response contains a stop string that its last token completes.

        Args:
            ids: the whole response, not empty; only where its last token can complete a stop string
                are they decoded.
        """
        last = ids[-1]
        if last not in self._can_end:
            self._can_end[last] = self._token_can_end(last)
        if not self._can_end[last]:
            return False
        text = _decode(ids, self._tokenizer)
        return any(stop in text for stop in self.strings)

    def _token_can_end(self, token: int) -> bool:
        text = _decode([token], self._tokenizer)
        if "\ufffd" in text:  # a part of a character, which may be completed by it
            return True
        # SentencePiece leaves out the space before a token that is decoded alone
        return any(_overlap(stop, start + text) for stop in self.strings for start in ("", " "))


def _overlap(stop: str, text: str) -> bool:
    """True where `text` contains the stop string, or begins with an end of it."""
    return stop in text or any(stop.endswith(text[:n]) for n in range(1, len(text) + 1))


def end_token_ids(tokenizer: Any) -> set[int]:
    """Ids that end an answer: EOS, the token that the chat template writes after each answer, and
    stop strings that are special tokens, which text does not show."""
    tokens = {tokenizer.eos_token, answer_frame(tokenizer).end_token} - {None}
    tokens |= {stop for stop in stop_strings(tokenizer) if stop in tokenizer.all_special_tokens}
    return set(tokenizer.convert_tokens_to_ids(sorted(tokens)))


def response_text(ids: Sequence[int], tokenizer: Any, prompt: Any = None) -> str:
    """Decode a sampled response: what it says, as the content of an assistant message.

    Special tokens are left out, and so is what the chat template writes around an answer. Where it
    declares stop strings, what follows from the first one on is left out, with the whitespace
    before.

    Args:
        prompt: what it answers; around the answer to a text prompt there is no template.
    """
    frame = answer_frame(tokenizer)
    if frame.end_token and ids and ids[-1] == tokenizer.convert_tokens_to_ids(frame.end_token):
        ids = ids[:-1]  # one that is not special would be text
    text = before_stop(_decode(ids, tokenizer), stop_strings(tokenizer))
    if isinstance(prompt, str):
        return text
    return text.removeprefix(frame.lead).removesuffix(frame.tail)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Cut a text at the first stop string, and strip whitespace at its end; without stop strings
    it stays as it is."""
    if not stops:
        return text
    found = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(found, default=len(text))].rstrip()


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    # without clean-up: it would take spaces away that the response has
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
