"""Encoding: canonical rows to token ids and labels, the same way for the three stages.

A conversation is cut into segments at its assistant turns, by rendering its prefixes with the chat
template; each segment is tokenised alone and the ids are joined. So labels follow segments, never
string offsets or pad tokens, and the prompt that PPO samples from has the ids that SFT trained on.

    messages  user "Hi", assistant "Yo"            under conf/chat_template/plain.jinja
    prompt    "### User:\\nHi\\n\\n### Assistant:\\n"   labels -100
    response  "Yo</s>"                             labels = ids
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config import InputError
from rlhf.data.canonical import Message, Prompt, Row, prompt_of, show
from rlhf.data.templates import stop_strings

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


# --- One row ------------------------------------------------------------------------------------


@dataclass
class _Segment:
    ids: list[int]
    is_response: bool  # an assistant turn, with what ends it


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    Text is tokenised as it is, after the BOS that the tokenizer adds by itself, if any. A
    conversation is rendered with the chat template, which writes the BOS where it wants one.
    """
    if isinstance(prompt, str):
        return _text_prompt(prompt, tokenizer)
    segments, done = _turns(prompt, tokenizer)
    rest = _continue(done, _render(prompt, tokenizer, generation_prompt=True), tokenizer)
    return [token for s in segments for token in s.ids] + _tokenize(rest, tokenizer)


def encode_response(prompt: Prompt, response: str, tokenizer: Any) -> list[int]:
    """Token ids of the response that follows `encode_prompt(prompt)`, with what ends it: EOS, or
    the stop string that the chat template writes after an answer."""
    if isinstance(prompt, str):
        return _with_eos(_tokenize(response, tokenizer), tokenizer)
    answer = {"role": "assistant", "content": response}
    _, text = _turn(prompt, answer, tokenizer)
    return _answer_ids(text, tokenizer)


def encode_row(
    row: Row, tokenizer: Any, train_on_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of an SFT row, and their labels.

    Every assistant turn of `messages` carries loss, with the EOS or stop string that ends it; of
    `prompt` and `completion` only the completion. What follows the last assistant turn is left out.

    Returns:
        input_ids and labels of equal length, labels -100 where there is no loss. The labels are
        not shifted.
    """
    if isinstance(row.get("completion"), str) and "messages" not in row:
        prompt = row["prompt"]
        segments = [
            _Segment(_text_prompt(prompt, tokenizer), False),
            _Segment(encode_response(prompt, row["completion"], tokenizer), True),
        ]
    else:
        given: list[Message] = [] if "messages" in row else row["prompt"]
        trained: list[Message] = row["messages"] if "messages" in row else row["completion"]
        segments, _ = _turns([*given, *trained], tokenizer)
        num_given = sum(message["role"] == "assistant" for message in given)
        for segment in [s for s in segments if s.is_response][:num_given]:
            segment.is_response = False
    ids = [token for s in segments for token in s.ids]
    labels = [t if s.is_response or train_on_prompt else IGNORED for s in segments for t in s.ids]
    return ids, labels


def _turns(messages: list[Message], tokenizer: Any) -> tuple[list[_Segment], str]:
    """Segments up to the last assistant turn, and the text that they hold."""
    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, response = _turn(messages[:i], message, tokenizer)
        prompt_ids = _tokenize(_continue(done, before, tokenizer), tokenizer)
        response_ids = _answer_ids(response, tokenizer)
        segments += [_Segment(prompt_ids, False), _Segment(response_ids, True)]
        done = before + response
    return segments, done


def _turn(context: list[Message], answer: Message, tokenizer: Any) -> tuple[str, str]:
    """Text before an assistant turn, and the text of the turn with what ends it, if anything."""
    if not context:
        raise InputError("a conversation starts with the assistant; it must start with the user")
    before = _render(context, tokenizer, generation_prompt=True)
    whole = _render([*context, answer], tokenizer, generation_prompt=False)
    _require_answer(whole.removeprefix(before), answer, tokenizer)
    text = _continue(before, whole, tokenizer)
    return before, text[: _end_of_answer(text, tokenizer)]


def _end_of_answer(text: str, tokenizer: Any) -> int:
    """Where the text of an assistant turn ends: after a stop string that only whitespace follows,
    as one in the middle is the answer's own; else after the last EOS."""
    stops = [(text.rfind(stop), len(stop)) for stop in stop_strings(tokenizer)]
    ends = [at + length for at, length in stops if at >= 0 and not text[at + length :].strip()]
    if ends:
        return max(ends)
    at = text.rfind(tokenizer.eos_token)
    return len(text) if at < 0 else at + len(tokenizer.eos_token)


def _answer_ids(text: str, tokenizer: Any) -> list[int]:
    ids = _tokenize(text, tokenizer)
    return ids if text.endswith(stop_strings(tokenizer)) else _with_eos(ids, tokenizer)


def _require_answer(text: str, answer: Message, tokenizer: Any) -> None:
    """Refuse a template that renders nothing of an answer: there would be nothing to train on."""
    words = answer["content"].split()
    if words and not any(word in text for word in words):
        raise InputError(
            f"the chat template {_in_one_line(tokenizer)} leaves out what the assistant says: "
            f"nothing of {show(answer['content'])} is in {show(text)}; set another one, e.g. "
            "model.chat_template=plain"
        )


def _in_one_line(tokenizer: Any) -> str:
    return show(tokenizer.chat_template.strip().replace("\n", " "))


def _continue(start: str, text: str, tokenizer: Any) -> str:
    """What follows `start` in `text`, both rendered from the same conversation."""
    if not text.startswith(start):
        raise InputError(
            f"the chat template {_in_one_line(tokenizer)} renders the start of a conversation "
            f"differently once more turns follow: {start[-40:]!r} is not in "
            f"{text[: len(start)][-60:]!r}; use one that only appends, e.g. "
            "model.chat_template=plain"
        )
    return text[len(start) :]


def _render(messages: list[Message], tokenizer: Any, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not isinstance(tokenizer.chat_template, str):
        raise InputError(
            "the rows are conversations but the tokenizer has no chat template; set one, e.g. "
            "model.chat_template=plain"
        )
    _require_eos(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template refuses a conversation of {roles}: {error}; fix the rows, or set "
            "another model.chat_template"
        ) from error


def _text_prompt(prompt: str, tokenizer: Any) -> list[int]:
    ids = _tokenize(prompt, tokenizer)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    # verbose: no warning about model_max_length; our own limits drop and count.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    _require_eos(tokenizer)
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token; a response could never end: set one")


# --- All rows of a stage ------------------------------------------------------------------------


def encode_sft(
    rows: Iterable[Row], tokenizer: Any, max_length: int, train_on_prompt: bool = False
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Encode SFT rows; those longer than `max_length` tokens are dropped, never truncated.

    Returns:
        {"input_ids", "labels"} per kept row, and the number of dropped rows by reason.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    for row in rows:
        ids, labels = encode_row(row, tokenizer, train_on_prompt)
        longest = max(longest, len(ids))
        if len(ids) > max_length:
            dropped[_too_long("dataset.max_length", max_length)] += 1
        else:
            encoded.append({"input_ids": ids, "labels": labels})
    _require_some(encoded, "dataset.max_length", max_length, longest)
    return encoded, dropped


def encode_texts(rows: Iterable[Row], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Encode the rows of PPO-ptx: `text` with BOS and EOS, or an SFT row as a whole.

    Args:
        max_length: longer texts are cut, tokens.

    Returns:
        Token ids per row, at least two each; shorter rows have nothing to predict and are left out.

    Raises:
        InputError: no row is left.
    """
    encoded = []
    for row in rows:
        if "text" in row:
            ids = _with_eos(_text_prompt(row["text"], tokenizer), tokenizer)
        else:
            ids, _ = encode_row(row, tokenizer)
        encoded.append(ids[:max_length])
    encoded = [ids for ids in encoded if len(ids) > 1]
    _require_some(encoded, "ptx.max_length", max_length, 1)
    return encoded


def encode_ranked(
    rows: Iterable[Row], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode ranked rows; a response that with its prompt exceeds `max_length` tokens is dropped.

    A row stays while at least two responses that are not tied are left of it: a pair that has a
    margin or a probability, and loses one, goes.

    Returns:
        Per kept row {"input_ids": K lists of prompt + response, "ranks": K ints, "lengths": K
        response lengths in tokens, EOS or stop string included, "row": index in `rows`, "scores": K
        floats, "margin", "probability": a float each, these three None where the row has none}; and
        what was dropped: rows, and under a reason of its own single responses of rows that stayed.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    for index, row in enumerate(rows):
        prompt_ids = encode_prompt(row["prompt"], tokenizer)
        answers = [encode_response(row["prompt"], r, tokenizer) for r in row["responses"]]
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


def encode_prompts(
    rows: Iterable[Row], tokenizer: Any, max_prompt_length: int | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode the prompts of canonical rows for PPO; those that are too long are dropped.

    Args:
        max_prompt_length: tokens; None for no limit.

    Returns:
        {"prompt": canonical prompt, "input_ids"} per kept row, and the dropped rows by reason.

    Raises:
        InputError: no row is left.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    for row in rows:
        prompt = prompt_of(row)
        ids = encode_prompt(prompt, tokenizer)
        longest = max(longest, len(ids))
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            dropped[_too_long("ppo.max_prompt_length", max_prompt_length)] += 1
        else:
            encoded.append({"prompt": prompt, "input_ids": ids})
    _require_some(encoded, "ppo.max_prompt_length", max_prompt_length, longest)
    return encoded, dropped


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
