"""One row to token ids and labels.

Labels follow the segments of a conversation, never string offsets or pad tokens, and no token
reaches from one segment into the next. So PPO samples from the very ids that SFT trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.rows import Prompt, Row, is_text
from rlhf.tokenizer import (
    Message,
    RewrittenPrompt,
    first_token_ids,
    has_end,
    next_token_ids,
    render_prompt,
    render_turn,
    with_eos,
)

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


# A part of a rendered conversation; True if it is an answer with loss, with its end.
Segment = tuple[str, bool]


def segments(messages: list[Message], tokenizer: Any, num_given: int = 0) -> list[list[Segment]]:
    """Cut a conversation at its assistant turns, up to the last, by rendering its prefixes.

    messages                 rendered with conf/chat_template/plain.jinja
    user "Hi"                prompt    "### User:\\nHi\\n\\n### Assistant:\\n"
    assistant "Yo"           response  "Yo</s>"
    user "Why?"              prompt    "\\n\\n### User:\\nWhy?\\n\\n### Assistant:\\n"
    assistant "So."          response  "So.</s>"

    Args:
        num_given: number of assistant turns at the start that carry no loss.

    Returns:
        One list of segments. A template may render earlier turns differently once more turns
        follow, for example without their <think> part: a new list then starts with the whole
        prompt. Lists without loss are left out, except the last.
    """
    lists, current, num_turns = [], list[Segment](), 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, response = render_turn(messages[:i], message, tokenizer)
        extended = _extend(current, prompt, tokenizer)
        if len(extended) == 1 and num_turns > num_given:
            lists.append(current)
        num_turns += 1
        current = [*extended, (response, num_turns > num_given)]
    return [*lists, current]


def _extend(done: list[Segment], prompt: str, tokenizer: Any) -> list[Segment]:
    """The segments so far and the rest of the prompt; the whole prompt alone where the chat
    template now renders these segments differently."""
    text = "".join(part for part, _ in done)
    if done and not prompt.startswith(text):
        *head, (last, is_response) = done  # some templates write EOS after the last turn only
        done = [*head, (last.removesuffix(tokenizer.eos_token), is_response)]
        text = text.removesuffix(tokenizer.eos_token)
    if prompt.startswith(text):
        return [*done, (prompt[len(text) :], False)]
    return [(prompt, False)]


def _ids_of(segments: list[Segment], tokenizer: Any) -> list[list[int]]:
    pieces, before = [], ""
    for text, _ in segments:
        pieces.append(next_token_ids(before, text, tokenizer))
        before += text
    return pieces


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    A text is tokenised unchanged, after the BOS that the tokenizer adds by itself, if any. A
    conversation is rendered with the chat template, which writes BOS where it wants one.
    """
    if isinstance(prompt, str):
        return first_token_ids(prompt, tokenizer)
    try:
        done = segments(prompt, tokenizer)[-1]
    except RewrittenPrompt:  # earlier answers cannot be trained on, but the next can be sampled
        done = []
    pieces = _ids_of(_extend(done, render_prompt(prompt, tokenizer), tokenizer), tokenizer)
    return [token for ids in pieces for token in ids]


def encode_response(prompt: Prompt, response: str, tokenizer: Any) -> list[int]:
    """Token ids of the response that follows `encode_prompt(prompt)`, with its end: EOS, or the end
    token or stop string that the chat template writes after an answer."""
    if isinstance(prompt, str):
        return with_eos(next_token_ids(prompt, response, tokenizer), tokenizer)
    answer = {"role": "assistant", "content": response}
    before, text = render_turn(prompt, answer, tokenizer)
    return _with_end(next_token_ids(before, text, tokenizer), text, tokenizer)


def _with_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    return ids if has_end(text, tokenizer) else with_eos(ids, tokenizer)


def encode_row(
    row: Row, tokenizer: Any, train_on_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of an SFT row, and their labels; the last of `encode_samples`."""
    return encode_samples(row, tokenizer, train_on_prompt)[-1]


def encode_samples(
    row: Row, tokenizer: Any, train_on_prompt: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Token ids of an SFT row, and their labels: one sequence, or several where the chat template
    renders earlier turns differently once more turns follow (see `segments`).

    Every assistant turn of `messages` carries loss once, together with its end; of `prompt` and
    `completion` only the completion does; of `text` every token and EOS. EOS follows earlier turns
    only where the template writes it. Turns after the last assistant turn are left out.

    The labels are -100 where there is no loss, and not shifted.
    """
    if is_text(row):
        text_ids = with_eos(first_token_ids(row["text"], tokenizer), tokenizer)
        return [(text_ids, list(text_ids))]
    has_messages = "messages" in row
    given: Any = [] if has_messages else row["prompt"]
    trained = row["messages" if has_messages else "completion"]
    if isinstance(trained, str):
        ids = [first_token_ids(given, tokenizer), encode_response(given, trained, tokenizer)]
        return [_labelled(ids, [False, True], train_on_prompt)]
    num_given = sum(message["role"] == "assistant" for message in given)
    samples = []
    for parts in segments([*given, *trained], tokenizer, num_given):
        pieces = _ids_of(parts, tokenizer)
        if parts:
            pieces[-1] = _with_end(pieces[-1], parts[-1][0], tokenizer)
        samples.append(_labelled(pieces, [loss for _, loss in parts], train_on_prompt))
    return samples


def _labelled(
    pieces: Sequence[list[int]], are_responses: Sequence[bool], train_on_prompt: bool
) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for piece, is_response in zip(pieces, are_responses, strict=True):
        ids += piece
        labels += piece if is_response or train_on_prompt else [IGNORED] * len(piece)
    return ids, labels
