"""Encoding: canonical rows to token ids and labels, the same way for the three stages.

A conversation is cut into segments at its assistant turns, by rendering its prefixes with the chat
template; no token reaches from one into the next. So labels follow segments, never string offsets
or pad tokens, and the prompt that PPO samples from has the ids that SFT trained on.

    messages  user "Hi", assistant "Yo"            under conf/chat_template/plain.jinja
    prompt    "### User:\\nHi\\n\\n### Assistant:\\n"   labels -100
    response  "Yo</s>"                             labels = ids
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.config import DatasetConfig, InputError
from rlhf.console import warn
from rlhf.data.rows import Prompt, Row, prompt_of
from rlhf.data.splits import Reason
from rlhf.tokenizer import Message
from rlhf.tokenizer.rendering import (
    RefusedConversation,
    RewrittenPrompt,
    has_end,
    render_prompt,
    render_turn,
    require_eos,
)

if TYPE_CHECKING:
    import torch

NUM_HISTORIES = 50  # prompts of which earlier turns are compared with what servers see
IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy
DROP = DatasetConfig.on_bad_row
REFUSED = "refused by the chat template"
NUM_CONTEXT_CHARACTERS = 64  # of the text before, to tokenise a text after; longer than tokens are


_In = TypeVar("_In")
_Out = TypeVar("_Out")

# --- One row ------------------------------------------------------------------------------------


@dataclass
class _Segment:
    text: str
    is_response: bool  # an assistant turn that carries loss, with what ends it


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    Text is tokenised as it is, after the BOS that the tokenizer adds by itself, if any. A
    conversation is rendered with the chat template, which writes the BOS where it wants one.
    """
    if isinstance(prompt, str):
        return _text_prompt(prompt, tokenizer)
    try:
        segments = _samples(prompt, tokenizer)[-1]
    except RewrittenPrompt:  # earlier answers cannot be trained on, but the next can be sampled
        segments = []
    segments = _extend(segments, render_prompt(prompt, tokenizer), tokenizer)
    return [token for ids in _segment_ids(segments, tokenizer) for token in ids]


def encode_response(prompt: Prompt, response: str, tokenizer: Any) -> list[int]:
    """Token ids of the response that follows `encode_prompt(prompt)`, with what ends it: EOS, or
    the end token or stop string that the chat template writes after an answer."""
    if isinstance(prompt, str):
        return _with_eos(_tokenize_after(prompt, response, tokenizer), tokenizer)
    answer = {"role": "assistant", "content": response}
    before, text = render_turn(prompt, answer, tokenizer)
    return _with_end(_tokenize_after(before, text, tokenizer), text, tokenizer)


def encode_row(
    row: Row, tokenizer: Any, train_on_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of an SFT row, and their labels; the last of `encode_samples`."""
    return encode_samples(row, tokenizer, train_on_prompt)[-1]


def encode_samples(
    row: Row, tokenizer: Any, train_on_prompt: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Token ids of an SFT row, and their labels: one sequence or, where the chat template renders
    earlier turns differently once more turns follow, several.

    Every assistant turn of `messages` carries loss, once, after the text that it is generated
    after, and with what ends it; of `prompt` and `completion` only the completion. EOS follows
    earlier turns only where the template writes it. What follows the last assistant turn is left
    out.

    Returns:
        input_ids and labels of equal length, labels -100 where there is no loss. The labels are
        not shifted.
    """
    if isinstance(row.get("completion"), str) and "messages" not in row:
        prompt = row["prompt"]
        ids = _text_prompt(prompt, tokenizer), encode_response(prompt, row["completion"], tokenizer)
        return [_labelled(ids, (False, True), train_on_prompt)]
    given: list[Message] = [] if "messages" in row else row["prompt"]
    trained: list[Message] = row["messages"] if "messages" in row else row["completion"]
    num_given = sum(message["role"] == "assistant" for message in given)
    samples = []
    for segments in _samples([*given, *trained], tokenizer, num_given):
        pieces = _segment_ids(segments, tokenizer)
        if segments:
            pieces[-1] = _with_end(pieces[-1], segments[-1].text, tokenizer)
        samples.append(_labelled(pieces, [s.is_response for s in segments], train_on_prompt))
    return samples


def _labelled(
    pieces: Sequence[list[int]], are_responses: Sequence[bool], train_on_prompt: bool
) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for piece, is_response in zip(pieces, are_responses, strict=True):
        ids += piece
        labels += piece if is_response or train_on_prompt else [IGNORED] * len(piece)
    return ids, labels


def _samples(messages: list[Message], tokenizer: Any, num_given: int = 0) -> list[list[_Segment]]:
    """Cut a conversation into segments at its assistant turns, up to the last; a turn whose prompt
    does not go on from the turn before begins a list of its own.

    Args:
        num_given: assistant turns at the start that carry no loss; lists of these alone are left
            out.
    """
    samples, segments, num_turns = [], list[_Segment](), 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, response = render_turn(messages[:i], message, tokenizer)
        extended = _extend(segments, before, tokenizer)
        if len(extended) == 1 and num_turns > num_given:
            samples.append(segments)
        num_turns += 1
        segments = [*extended, _Segment(response, num_turns > num_given)]
    return [*samples, segments]


def _extend(segments: list[_Segment], prompt: str, tokenizer: Any) -> list[_Segment]:
    """Segments of a prompt: those of the turns so far and the rest; the prompt by itself where the
    chat template now renders these turns differently."""
    done = "".join(segment.text for segment in segments)
    if segments and not prompt.startswith(done):
        *head, last = segments  # some templates write EOS after the last turn only
        segments = [*head, _Segment(last.text.removesuffix(tokenizer.eos_token), last.is_response)]
        done = done.removesuffix(tokenizer.eos_token)
    if prompt.startswith(done):
        return [*segments, _Segment(prompt[len(done) :], False)]
    return [_Segment(prompt, False)]


def _segment_ids(segments: list[_Segment], tokenizer: Any) -> list[list[int]]:
    pieces, done = [], ""
    for segment in segments:
        pieces.append(_tokenize_after(done, segment.text, tokenizer))
        done += segment.text
    return pieces


def _tokenize_after(start: str, text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that follows `start`: as in the whole, so that servers, which tokenise
    the whole, see the same; by itself where a token of the whole would reach across.

    SentencePiece begins a text with a space of its own: "Yo" is "_Yo" alone, "Yo" after a newline.
    """
    if start and _first_token_differs(tokenizer):
        context = start[-NUM_CONTEXT_CHARACTERS:]
        before, whole = _tokenize(context, tokenizer), _tokenize(context + text, tokenizer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return _tokenize(text, tokenizer)


@lru_cache(maxsize=32)
def _first_token_differs(tokenizer: Any) -> bool:
    """True where a text at the start has other ids than after another text.

    SentencePiece gives it a space; Phi-3's tokens take the whitespace behind them (`rstrip`).
    """
    if any(token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return True
    return any(
        _tokenize(start + "a", tokenizer) != _tokenize(start, tokenizer) + _tokenize("a", tokenizer)
        for start in ("\n", ":", tokenizer.eos_token or ":")
    )


def _text_prompt(prompt: str, tokenizer: Any) -> list[int]:
    ids = _tokenize(prompt, tokenizer)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    # verbose: no warning about model_max_length; our own limits drop and count.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _with_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    return ids if has_end(text, tokenizer) else _with_eos(ids, tokenizer)


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    require_eos(tokenizer)
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


# --- All rows of a stage ------------------------------------------------------------------------


def not_refused(
    rows: Sequence[_In], encode: Callable[[_In], _Out], on_bad_row: str, dropped: Counter[str]
) -> Iterator[tuple[int, _Out]]:
    """Encode rows, leaving out those that the chat template refuses.

    Args:
        on_bad_row: "drop" counts them while they are fewer than half; "stop" refuses the first.
        dropped: added to.

    Yields:
        Index of the row, and what `encode` makes of it.

    Raises:
        RefusedConversation: see `on_bad_row`.
    """
    first, count = None, 0
    for index, row in enumerate(rows):
        try:
            made = encode(row)
        except RefusedConversation as error:
            if on_bad_row == "stop":
                fix = "; dataset.on_bad_row=drop drops such rows"
                raise RefusedConversation(f"{error}{fix}") from error
            dropped[Reason(REFUSED, str(error))] += 1
            first, count = first or error, count + 1
            continue
        yield index, made
    if first is not None and 2 * count >= len(rows):
        rule = "dataset.on_bad_row=drop drops them only while they are fewer than half"
        share = f"{count} of {len(rows)} rows are refused"
        raise RefusedConversation(f"{first} ({share}; {rule})") from first


def encode_sft(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int,
    train_on_prompt: bool = False,
    on_bad_row: str = DROP,
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Encode SFT rows; those longer than `max_length` tokens are dropped, never truncated.

    Args:
        on_bad_row: see `not_refused`.

    Returns:
        {"input_ids", "labels"} per kept row, or per sequence where `encode_samples` makes several
        of a row, and the number of dropped ones by reason.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped, rows = [], 0, Counter[str](), list(rows)
    _warn_about_history([prompt_of(row) for row in rows], tokenizer)
    encode = partial(encode_samples, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    for _, samples in not_refused(rows, encode, on_bad_row, dropped):
        for ids, labels in samples:
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                dropped[_too_long("dataset.max_length", max_length)] += 1
            else:
                encoded.append({"input_ids": ids, "labels": labels})
    _require_some(encoded, "dataset.max_length", max_length, longest)
    return encoded, dropped


def encode_texts(
    rows: Sequence[Row], tokenizer: Any, max_length: int, on_bad_row: str = DROP
) -> tuple[list[list[int]], Counter[str]]:
    """Encode the rows of PPO-ptx: `text` with BOS and EOS, or an SFT row as a whole.

    Args:
        max_length: longer texts are cut, tokens.
        on_bad_row: see `not_refused`.

    Returns:
        Token ids per kept row, at least two each; and the number of dropped ones by reason: shorter
        rows have nothing to predict.

    Raises:
        InputError: no row is left.
    """
    encoded, dropped = [], Counter[str]()
    for _, ids in not_refused(rows, partial(encode_text, tokenizer=tokenizer), on_bad_row, dropped):
        if len(ids[:max_length]) > 1:
            encoded.append(ids[:max_length])
        else:
            dropped["shorter than two tokens"] += 1
    _require_some(encoded, "ptx.max_length", max_length, 1)
    return encoded, dropped


def encode_text(row: Row, tokenizer: Any) -> list[int]:
    """Token ids of a row of PPO-ptx, see `encode_texts`."""
    if "text" in row:
        return _with_eos(_text_prompt(row["text"], tokenizer), tokenizer)
    return encode_row(row, tokenizer)[0]


def encode_ranked(
    rows: Sequence[Row], tokenizer: Any, max_length: int, on_bad_row: str = DROP
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode ranked rows; a response that with its prompt exceeds `max_length` tokens is dropped.

    A row stays while at least two responses that are not tied are left of it: a pair that has a
    margin or a probability, and loses one, goes.

    Args:
        on_bad_row: see `not_refused`.

    Returns:
        Per kept row {"input_ids": K lists of prompt + response, "ranks": K ints, "lengths": K
        response lengths in tokens, EOS or stop string included, "row": index in `rows`, "scores": K
        floats, "margin", "probability": a float each, these three None where the row has none}; and
        what was dropped: rows, and under a reason of its own single responses of rows that stayed.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    encode = partial(_prompt_and_responses, tokenizer=tokenizer)
    for index, (prompt_ids, answers) in not_refused(rows, encode, on_bad_row, dropped):
        row = rows[index]
        longest = max(longest, *(len(prompt_ids) + len(ids) for ids in answers))
        fits = [i for i, ids in enumerate(answers) if len(prompt_ids) + len(ids) <= max_length]
        if len({row["ranks"][i] for i in fits}) < 2:
            dropped[_too_long("dataset.max_length", max_length)] += 1
            continue
        if len(fits) < len(answers):
            reason = f"single responses {_too_long('dataset.max_length', max_length)}"
            dropped[reason] += len(answers) - len(fits)
        encoded.append(
            {
                "input_ids": [prompt_ids + answers[i] for i in fits],
                "ranks": [row["ranks"][i] for i in fits],
                "lengths": [len(answers[i]) for i in fits],
                "row": index,
                "scores": [float(row["scores"][i]) for i in fits] if "scores" in row else None,
                "margin": row.get("margin"),
                "probability": row.get("probability"),
            }
        )
    _require_some(encoded, "dataset.max_length", max_length, longest)
    return encoded, dropped


def _prompt_and_responses(row: Row, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    prompt = row["prompt"]
    responses = [encode_response(prompt, text, tokenizer) for text in row["responses"]]
    return encode_prompt(prompt, tokenizer), responses


def encode_prompts(
    rows: Iterable[Row], tokenizer: Any, max_prompt_length: int | None, on_bad_row: str = DROP
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode the prompts of canonical rows for PPO; those that are too long are dropped, and those
    of which no token is left.

    Args:
        max_prompt_length: tokens; None for no limit.
        on_bad_row: see `not_refused`.

    Returns:
        {"prompt": canonical prompt, "input_ids"} per kept row, and the dropped rows by reason.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    prompts = [prompt_of(row) for row in rows]
    _warn_about_history(prompts, tokenizer)
    encode = partial(encode_prompt, tokenizer=tokenizer)
    for index, ids in not_refused(prompts, encode, on_bad_row, dropped):
        longest = max(longest, len(ids))
        if not ids:
            dropped["prompts without a token"] += 1
        elif max_prompt_length is not None and len(ids) > max_prompt_length:
            dropped[_too_long("ppo.max_prompt_length", max_prompt_length)] += 1
        else:
            encoded.append({"prompt": prompts[index], "input_ids": ids})
    _require_some(encoded, "ppo.max_prompt_length", max_prompt_length, longest)
    return encoded, dropped


def _warn_about_history(prompts: Iterable[Prompt], tokenizer: Any) -> None:
    """Warn where earlier turns have other token ids than a server gives them, which tokenises the
    rendered prompt as a whole: there a token reaches from one turn into the next."""
    later = (p for p in prompts if isinstance(p, list) and "assistant" in {m["role"] for m in p})
    for prompt in islice(later, NUM_HISTORIES):
        try:
            ids = encode_prompt(prompt, tokenizer)
            served = _tokenize(render_prompt(prompt, tokenizer), tokenizer)
        except RefusedConversation:  # it is counted where it is encoded
            continue
        if ids != served:
            at = len(os.path.commonprefix([ids, served]))
            theirs, ours = (tokenizer.decode(part[at : at + 3]) for part in (served, ids))
            warn(
                "a token of the tokenizer reaches from one turn into the next, so servers give "
                f"earlier turns other token ids ({theirs!r}) than are trained on ({ours!r}); a "
                "chat template that ends turns with a special token prevents that"
            )
            return


def _too_long(name: str, limit: int) -> str:
    return f"longer than {name}={limit} tokens"


def _require_some(encoded: list[Any], name: str, limit: int | None, longest: int) -> None:
    if not encoded:
        raise InputError(
            f"{name}={limit} leaves no row; raise it: the longest has {longest} tokens"
        )


# --- Batches ------------------------------------------------------------------------------------


@dataclass
class RankedCollator:
    """Collate encoded ranked rows; all responses of a prompt stand in one batch, in order.

    Returns:
        input_ids (N, L) right-padded, attention_mask (N, L) from lengths (so that pad may equal
        EOS), ranks (N,), groups (N,): index of the prompt in the batch. All int64. (N,) float32:
        scores of the data (0 where the row has none), margin of the response's pair (0), and the
        probability that the response is preferred (1).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        sequences = [ids for row in rows for ids in row["input_ids"]]
        lengths = torch.tensor([len(ids) for ids in sequences])
        input_ids = torch.full((len(sequences), int(lengths.max())), self.pad_token_id)
        for i, ids in enumerate(sequences):
            input_ids[i, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]  # (N, L)
        strengths = [_strengths(row) for row in rows]
        return {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.tensor([i for i, row in enumerate(rows) for _ in row["ranks"]]),
            **{
                name: torch.tensor([value for strength in strengths for value in strength[name]])
                for name in ("scores", "margin", "probability")
            },
        }


def _strengths(row: dict[str, Any]) -> dict[str, list[float]]:
    """What says how much better a response is, one number each; without it, what has no effect."""
    num, probability = len(row["ranks"]), row.get("probability")
    return {
        "scores": row.get("scores") or [0.0] * num,
        "margin": [float(row.get("margin") or 0.0)] * num,
        "probability": [1.0] * num if probability is None else [probability, 1.0 - probability],
    }
