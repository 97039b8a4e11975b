"""Rendering: conversations to text, sampled responses to text, and where an answer ends.

We measure once, on a conversation of our own, what a chat template writes around an answer:

    <|im_start|>assistant\\n    <think></think>    Yo        " "     <|im_end|>    \\n
    header                     lead               answer    tail    end token     the next prompt's

The header belongs to the prompt, even where the template has no generation prompt. The model writes
lead, tail and end token; a scorer gets only the answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf.config import InputError, show
from rlhf.tokenizer.chat_templates import stop_strings, template_of
from rlhf.tokenizer.ids import require_eos

Message = dict[str, str]  # {"role": ..., "content": ...}
PROBE = "xyzzy"  # an answer that no template writes by itself
_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Hi"}
_ANSWER = {"role": "assistant", "content": PROBE}


class RefusedConversation(InputError):
    """The chat template refuses this conversation; it may accept others."""


class RewrittenPrompt(RefusedConversation):
    """The chat template renders a prompt differently once its answer follows."""


@dataclass(frozen=True)
class Frame:
    """The text that a chat template writes around an answer; empty where it cannot be found."""

    header: str = ""  # before an answer, where the generation prompt lacks it
    lead: str = ""  # between prompt and answer, without special tokens; the model writes it
    tail: str = ""  # between answer and end token, likewise
    end_token: str | None = None  # ends every answer, also in earlier turns


def answer_frame(tokenizer: Any) -> Frame:
    """Measure what the tokenizer's chat template writes around an answer."""
    template = template_of(tokenizer)
    if template is None:
        return Frame()
    return _measure(tokenizer, template, tokenizer.eos_token, len(tokenizer))


@lru_cache(maxsize=32)
def _measure(tokenizer: Any, template: str, eos: str | None, num_tokens: int) -> Frame:
    """See `answer_frame`; the arguments are those whose change calls for a new measurement."""
    for context in ([_USER], [_SYSTEM, _USER]):  # some templates insist on a system message
        try:
            bare = render(context, tokenizer, generation_prompt=False)
            prompt = render(context, tokenizer, generation_prompt=True)
            last = render([*context, _ANSWER], tokenizer, generation_prompt=False)
            earlier = render([*context, _ANSWER, _USER], tokenizer, generation_prompt=True)
        except InputError:  # raised again where a row is rendered
            continue
        break
    else:
        return Frame()
    at = last.rfind(PROBE)
    if at < 0:
        return Frame()
    header = _header(bare, last) if bare == prompt else ""
    start = len(prompt + header) if last.startswith(prompt) else at
    after = last[at + len(PROBE) :]
    shared = os.path.commonprefix([after, earlier.partition(PROBE)[2]])
    end_token = _end_token(shared, eos, tokenizer.get_added_vocab())
    end = end_token or eos
    tail = after[: after.find(end)] if end and end in after else after
    lead = last[start:at]
    for token in tokenizer.all_special_tokens:
        lead, tail = lead.replace(token, ""), tail.replace(token, "")
    return Frame(header, lead, tail, end_token)


def _header(bare: str, whole: str) -> str:
    """Return the text before `PROBE`, without the spaces at its end: tokens begin with them."""
    header = whole[len(bare) : whole.rfind(PROBE)].rstrip(" ") if whole.startswith(bare) else ""
    return header if header.strip() else ""


def _end_token(text: str, eos: str | None, tokens: Iterable[str]) -> str | None:
    """Find the token that ends an answer: EOS, else the added token that begins the text."""
    if eos and eos in text:
        return eos
    text = text.lstrip()
    found = [token for token in tokens if token.strip() and text.startswith(token)]
    return max(found, key=len, default=None)


# --- A conversation -----------------------------------------------------------------------------


def render(messages: list[Message], tokenizer: Any, generation_prompt: bool) -> str:
    """Render a conversation with the tokenizer's chat template."""
    from jinja2 import TemplateError

    if template_of(tokenizer) is None:
        raise InputError(
            "the rows are conversations but the tokenizer has no chat template; set one, e.g. "
            "model.chat_template=plain"
        )
    require_eos(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError, LookupError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RefusedConversation(
            f"the chat template refuses a conversation of {roles}: {error} (it begins with "
            f"{show(messages[0]['content'])}); fix the rows, or set another model.chat_template"
        ) from error


def render_prompt(context: list[Message], tokenizer: Any) -> str:
    """Render a conversation up to where the next answer begins.

    A template without a generation prompt writes the header only together with an answer.
    """
    prompt = render(context, tokenizer, generation_prompt=True)
    if not answer_frame(tokenizer).header:
        return prompt
    whole = render([*context, _ANSWER], tokenizer, generation_prompt=False)
    return prompt + _header(prompt, whole)


def render_turn(context: list[Message], answer: Message, tokenizer: Any) -> tuple[str, str]:
    """Render an assistant turn as it is generated: after its context, with no turn after it.

    Returns:
        The text before the turn, see `render_prompt`, and the text of the turn with its end, if
        the template writes one.

    Raises:
        RewrittenPrompt: the template renders the context differently when the answer follows.
    """
    if not context:
        what = "a conversation starts with the assistant"
        raise RefusedConversation(f"{what}; it must start with the user")
    before = render_prompt(context, tokenizer)
    whole = render([*context, answer], tokenizer, generation_prompt=False)
    _require_answer(whole.removeprefix(before), answer, tokenizer)
    if not whole.startswith(before):
        raise RewrittenPrompt(
            f"the chat template {_in_one_line(tokenizer)} renders the start of a conversation "
            f"differently once more turns follow: {before[-40:]!r} is not in "
            f"{whole[: len(before)][-60:]!r}; use one that writes the generation prompt before "
            "each answer, e.g. model.chat_template=plain"
        )
    text = whole[len(before) :]
    return before, text[: _end_of_answer(text, tokenizer)]


def has_end(text: str, tokenizer: Any) -> bool:
    """True where the text of an assistant turn ends with a stop string or the end token."""
    end_token = answer_frame(tokenizer).end_token
    return text.endswith((*stop_strings(tokenizer), *([end_token] if end_token else [])))


def _end_of_answer(text: str, tokenizer: Any) -> int:
    """Index where the text of an assistant turn ends: after a stop string that only whitespace
    follows (one in the middle belongs to the answer); else after the last end token, or after an
    EOS that only whitespace follows."""
    stops = [(text.rfind(stop), len(stop)) for stop in stop_strings(tokenizer)]
    ends = [at + length for at, length in stops if at >= 0 and not text[at + length :].strip()]
    if ends:
        return max(ends)
    end_token = answer_frame(tokenizer).end_token
    end = end_token or tokenizer.eos_token
    at = text.rfind(end)
    # without an end token, an EOS before other text comes from the answer, not from the template
    is_end = at >= 0 and (end_token is not None or not text[at + len(end) :].strip())
    return at + len(end) if is_end else len(text)


def _require_answer(text: str, answer: Message, tokenizer: Any) -> None:
    """Refuse a template that leaves out the whole answer: there would be nothing to train on."""
    content = answer["content"]
    words = re.findall(r"\w+", content) or content.split()  # <think>a</think>b may become b
    if words and not any(word in text for word in words):
        raise RefusedConversation(
            f"the chat template {_in_one_line(tokenizer)} leaves out what the assistant says: "
            f"nothing of {show(content)} is in {show(text)}; set another one, e.g. "
            "model.chat_template=plain"
        )


def _in_one_line(tokenizer: Any) -> str:
    return show(str(template_of(tokenizer)).strip().replace("\n", " "))


# --- A sampled response -------------------------------------------------------------------------


class StopStrings:
    """Tells when a response that grows token by token reaches a stop string (`strings`)."""

    def __init__(self, tokenizer: Any):
        self.strings, self._tokenizer = stop_strings(tokenizer), tokenizer
        self._can_end: dict[int, bool] = {}

    def end(self, ids: Sequence[int]) -> bool:
        """True where the last token of a response (`ids`, not empty) completes a stop string."""
        last = ids[-1]
        if last not in self._can_end:
            self._can_end[last] = self._token_can_end(last)
        if not self._can_end[last]:  # most tokens: the response is not decoded
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

    Special tokens, the text that the chat template writes around an answer (none after a `prompt`
    that is text), and everything from the first stop string on are left out.
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
