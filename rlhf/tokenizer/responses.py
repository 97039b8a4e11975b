"""Sampled token ids: where a response ends, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.tokenizer.chat_templates import stop_strings
from rlhf.tokenizer.rendering import answer_frame


class StopStrings:
    """Tells when a response that grows token by token reaches a stop string (`strings`)."""

    def __init__(self, tokenizer: Any):
        self.strings, self._tokenizer = stop_strings(tokenizer), tokenizer
        self._can_end: dict[int, bool] = {}

    def end(self, ids: Sequence[int]) -> bool:
        """True where the last token of a response completes a stop string.

        Args:
            ids: the whole response, not empty; decoded only where the last token can complete one.
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
        if "\ufffd" in text:  # a part of a character, which this token may complete
            return True
        # SentencePiece leaves out the space before a token that is decoded alone
        return any(_overlap(stop, start + text) for stop in self.strings for start in ("", " "))


def _overlap(stop: str, text: str) -> bool:
    """True where `text` contains the stop string, or begins with the end of it."""
    return stop in text or any(stop.endswith(text[:n]) for n in range(1, len(text) + 1))


def end_token_ids(tokenizer: Any) -> set[int]:
    """Ids that end an answer: EOS, the token that the chat template writes after each answer, and
    stop strings that are special tokens, because decoding leaves those out."""
    tokens = {tokenizer.eos_token, answer_frame(tokenizer).end_token} - {None}
    tokens |= {stop for stop in stop_strings(tokenizer) if stop in tokenizer.all_special_tokens}
    return set(tokenizer.convert_tokens_to_ids(sorted(tokens)))


def response_text(ids: Sequence[int], tokenizer: Any, prompt: Any = None) -> str:
    """Decode a sampled response to the content of an assistant message.

    Special tokens and the text that the chat template writes around an answer are left out, and so
    is everything from the first stop string on, with the whitespace before it.

    Args:
        prompt: the prompt of the response; a text prompt has no template around its answer.
    """
    frame = answer_frame(tokenizer)
    if frame.end_token and ids and ids[-1] == tokenizer.convert_tokens_to_ids(frame.end_token):
        ids = ids[:-1]  # decoding would keep an end token that is not special
    text, stops = _decode(ids, tokenizer), stop_strings(tokenizer)
    if stops:
        found = [at for at in map(text.find, stops) if at >= 0]
        text = text[: min(found, default=len(text))].rstrip()
    if isinstance(prompt, str):
        return text
    return text.removeprefix(frame.lead).removesuffix(frame.tail)


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    # without clean-up, which would remove spaces of the response
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
