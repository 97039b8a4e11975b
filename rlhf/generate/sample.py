"""Answer a file of prompts with a trained policy, or a model at an endpoint.

    python -m rlhf.generate path=runs/mine/ppo/final prompts=prompts.jsonl out=answers.jsonl
    python -m rlhf.generate url=http://127.0.0.1:8000/v1 model=Qwen/Qwen3-8B prompts=prompts.jsonl samples_per_prompt=4

That is mode=sample. `mode=self_instruct --help` is about new tasks after the pattern of a few,
`mode=self_chat --help` about conversations that begin with given questions,
`mode=two_agents --help` about those of two models, `mode=score_rows --help` about scores.

Rows are those that PPO reads: with a `prompt` (text or messages), `messages`, whose last answer is
left out, or an `instruction`, for example. A .txt file has one prompt per line. Written rows keep
their other columns and have

    prompt            as the model was asked, with the system message
    response          the answer; with samples_per_prompt=4 it is `responses`, a list
    ended             false: the answer used up its budget (a list next to `responses`)
    best_of_score     with best_of=<reward model>: the score of the answer that it likes best, the
                      only one that is kept
    not_answered      why the answer is empty: the prompt does not fit, for example

`python -m rlhf.score path=<reward model> data=answers.jsonl` scores them. An answer depends on the
seed and the number of its row, not on other rows. A stopped command continues when it is given
again, and ends with the same bytes. Answers of an endpoint are kept in <out>.answers.sqlite as they
come, and are not asked for again. Left out: several processes.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import InputError, ScorerConfig, show
from rlhf.console import say
from rlhf.data import (
    BadRow,
    DropRow,
    check_row,
    prompt_of,
    read_lines,
    read_rows,
    repaired,
    resolve_format,
)
from rlhf.data.detect import ORDER, reads
from rlhf.data.read import LONGEST_ROW, too_long
from rlhf.data.rows import as_rows
from rlhf.generate.options import GenerateOptions, check_author
from rlhf.option_parser import check_options
from rlhf.policy import Policy
from rlhf.row_file import RowFile, chunks_of, new_file, refuse_rows

TEXT_SUFFIXES = (".txt", "")
STRIDE = 2**32  # between the numbers of two answers to a prompt; no file has so many rows
# columns of earlier answers, which would not belong to the new ones
REPLACED = "messages response responses score scores ended best_of_score not_answered".split()


@dataclass
class Question:
    """A row of the file, and what the policy is asked."""

    number: int  # of the row, from 0
    kept: dict[str, Any]  # the columns that are written again
    prompt: Any = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    budget: int = 0  # longest answer, tokens
    not_answered: str | None = None
    responses: Any = None  # answers that the row has already: not asked for here, but in rlhf.rank


def run(options: GenerateOptions) -> None:
    """Answer the file; all rows are examined before any is answered."""
    check_options(options)
    check_author(options)
    if options.best_of and options.samples_per_prompt < 2:
        raise InputError("best_of chooses among several answers; add samples_per_prompt=4")
    source = Path(options.prompts).expanduser()
    out = Path(options.out or source.with_suffix(".answers.jsonl"))
    with new_file(out):
        questions, digest = read_prompts(source)
        file = RowFile(out, _made_from(options, len(questions), digest))
        answerer = Answerer(options, out)
        say(answerer.describe())
        answerer.prepare(questions, source)

        def answer(chunk: range) -> Iterator[dict[str, Any]]:
            return answerer(questions[chunk.start : chunk.stop])

        sizes = [options.samples_per_prompt] * len(questions)
        rows = file.write(
            chunks_of(sizes, options.batch_size), answer, len(questions), unit="prompt"
        )
    say(f"{_summary(rows, answerer)}\nsaved {out}")


def _made_from(options: GenerateOptions, num_rows: int, digest: str) -> dict[str, Any]:
    from rlhf.checkpoint import hash_weights

    names = [field.name for field in dataclasses.fields(options)]
    free = {"prompts", "out", "device", "trust_remote_code"}
    free |= {"key_env", "timeout", "retries", "num_requests"}
    made_from: dict[str, Any] = {"rows": num_rows, "sha256 of the prompts": digest}
    made_from |= {name: getattr(options, name) for name in names if name not in free}
    for name in ("path", "best_of"):
        model = Path(getattr(options, name) or "")
        if getattr(options, name) and model.exists():
            made_from[f"sha256 of the weights of {name}"] = hash_weights(model)
    return made_from


def _summary(rows: list[dict[str, Any]], answerer: Answerer) -> str:
    refused = [row["not_answered"] for row in rows if "not_answered" in row]
    ended = [row["ended"] for row in rows if "not_answered" not in row]
    flat = [one for each in ended for one in (each if isinstance(each, list) else [each])]
    parts = [f"{len(ended):,} of {len(rows):,} prompts answered"]
    if refused:
        parts.append(f"{len(refused):,} not (the first: {refused[0]})")
    if flat:
        parts.append(f"{sum(flat) / len(flat):.1%} of the answers ended by themselves")
    if empty := sum(not text.strip() for row in rows for text in _texts_of(row)):
        parts.append(f"{empty:,} answers are empty")
    if answerer.num_tokens:
        parts.append(f"{answerer.num_tokens / answerer.seconds:,.0f} tokens/s")
    if answerer.author is not None and answerer.author.num_known:
        parts.append(f"{answerer.author.num_known:,} answers were known before")
    if answerer.num_cut:
        parts.append(f"best_of read only the beginning of {answerer.num_cut:,} answers (too long)")
    return "; ".join(parts)


def _texts_of(row: dict[str, Any]) -> list[str]:
    """The answers in a written row; none where the prompt was not answered."""
    return [] if "not_answered" in row else row.get("responses") or [row["response"]]


# --- Prompts --------------------------------------------------------------------------------------


def read_prompts(source: Path) -> tuple[list[Question], str]:
    """Read and check the prompts of a file; return them and the SHA-256 of the file."""
    if not source.is_file():
        raise InputError(f"prompts={source} is not a file")
    data = source.read_bytes()
    questions: list[Question] = []
    problems = []
    for where, raw in _raw_rows(source):
        try:
            questions.append(_read_row(len(questions), raw))
        except (InputError, KeyError) as error:
            problems.append(f"{where}: {error}")
    refuse_rows(problems, f"prompts={source}, nothing was answered")
    if not questions:
        raise InputError(f"prompts={source} has no prompts")
    return questions, hashlib.sha256(data).hexdigest()


def _raw_rows(source: Path) -> Iterator[tuple[str, Any]]:
    if source.suffix.lower() not in TEXT_SUFFIXES:
        yield from read_rows(str(source), "train", "ppo", "prompts")
        return
    for where, line in read_lines(source):
        yield where, too_long(len(line)) if len(line) > LONGEST_ROW else {"prompt": line}


def _read_row(number: int, raw: Any) -> Question:
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        raise InputError(f"got {show(raw)}; expected an object with a prompt")
    given = {name: value for name, value in raw.items() if value is not None}
    found = next((name for name in ORDER["ppo"] if reads(name, given, "ppo")), None)
    if found is None:
        names = ", ".join(sorted(given)) or "no fields"
        raise InputError(f"expected `prompt` or `messages`; the row has {names}")
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:
        raise InputError(f"the row cannot be written as JSON: {error}") from error
    raw = repaired(raw, "row", [])
    question = Question(number, {n: v for n, v in raw.items() if n not in REPLACED})
    question.responses = [] if raw.get("not_answered") else raw.get("responses")
    try:
        canonical = as_rows(resolve_format(found)(repaired(given, "row", [])))[0]
        check_row(canonical, "ppo")
        question.prompt = prompt_of(canonical)
    except DropRow as reason:
        question.prompt = given.get("prompt") or given.get("messages") or ""
        question.not_answered = str(reason)
    return question


# --- Answers --------------------------------------------------------------------------------------


class Answerer:
    """Samples the answers, and chooses one of them where there is a reward model.

    Attributes:
        num_tokens, seconds: of the answers that this process sampled.
        num_cut: answers that the reward model had to cut.
    """

    def __init__(self, options: GenerateOptions, out: Path | None = None):
        """Load the policy, or take the endpoint, and load the reward model.

        Args:
            out: the file that is written; the answers of an endpoint are kept next to it.
        """
        from rlhf.distributed import default_device
        from rlhf.scorers import RewardModelScorer

        self.options = options
        self.policy: Any = None
        self.author: Any = None  # at an endpoint
        if options.path:
            self.policy = Policy(options, options.path)
        else:
            from rlhf.generate.author import Author  # it imports this file

            own = dataclasses.replace(options, system=None)  # the prompts have it
            self.author = Author(own, out or Path(options.prompts))
        if (self.policy or self.author).temperature == 0 and options.samples_per_prompt > 1:
            raise InputError(
                f"with temperature 0 all {options.samples_per_prompt} answers to a prompt are "
                "equal; add temperature=1, or leave samples_per_prompt out"
            )
        self.scorer: Any = None
        if options.best_of:
            config = ScorerConfig(options.best_of, options.normalize, options.batch_size)
            device, code = options.device or default_device(), options.trust_remote_code
            self.scorer = RewardModelScorer(config, device, "float32", "best_of", code)
        self.num_tokens = self.num_cut = 0
        self.seconds = 0.0

    def describe(self) -> str:
        """Say what answers."""
        return str((self.policy or self.author).describe())

    def prepare(self, questions: list[Question], source: Path) -> None:
        """Encode the prompts; note those that cannot be answered."""
        from rlhf.tokenizer import RefusedConversation

        why_text = self.policy and self.policy.why_text
        chats = [q.number + 1 for q in questions if not isinstance(q.prompt, str)]
        if why_text and chats:
            raise InputError(
                f"prompts={source}: row {chats[0]} is a conversation, but path={self.policy.path} "
                f"continues text: {why_text}; add chat_template=plain"
            )
        for question in questions:
            if question.not_answered is None:
                if not why_text:
                    turns = question.prompt
                    if isinstance(turns, str):
                        turns = [{"role": "user", "content": turns}]
                    question.prompt = self.options.with_system(turns)
                try:
                    self._encode(question)
                except RefusedConversation as error:
                    question.not_answered = str(error)

    def _encode(self, question: Question) -> None:
        from rlhf.sampling import context_length

        if self.policy is not None:
            question.ids = self.policy.encode_prompt(question.prompt)
            context, length = context_length(self.policy.model), len(question.ids)
            question.budget = min(self.options.response_length, context - length)
            if not length:
                question.not_answered = "the prompt has no tokens"
            elif question.budget < 1:
                what = f"the prompt has {length} tokens, the model's context {context}"
                question.not_answered = what
        if question.not_answered is None and self.scorer is not None:
            length, context = self.scorer.prompt_length(question.prompt), self.scorer.max_length
            if length >= context:
                what = f"the prompt has {length} tokens, the context of best_of {context}"
                question.not_answered = what

    def __call__(self, questions: list[Question]) -> Iterator[dict[str, Any]]:
        """Answer some questions; return their rows."""
        asked = [question for question in questions if question.not_answered is None]
        answers = dict(zip([q.number for q in asked], self._answers(asked), strict=True))
        for question in questions:
            row = question.kept | {"prompt": question.prompt}
            if question.not_answered is not None:
                yield row | {"response": "", "not_answered": question.not_answered}
            else:
                yield row | answers[question.number]

    def _answers(self, asked: list[Question]) -> list[dict[str, Any]]:
        """The answers to each question, as columns of its row."""
        texts, ended = self._ask(asked) if self.author else self._sample(asked)
        if self.scorer is not None:
            return self._best(asked, texts, ended)
        if self.options.samples_per_prompt == 1:
            pairs = zip(texts, ended, strict=True)
            return [{"response": text[0], "ended": end[0]} for text, end in pairs]
        return [{"responses": t, "ended": e} for t, e in zip(texts, ended, strict=True)]

    def _ask(self, asked: list[Question]) -> tuple[list[list[str]], list[list[bool]]]:
        """As `_sample`, from the endpoint; an answer that is known is not asked for again."""
        count = self.options.samples_per_prompt
        numbers = [question.number + i * STRIDE for question in asked for i in range(count)]
        prompts = [question.prompt for question in asked for _ in range(count)]
        replies = iter(self.author.ask(numbers, prompts))
        grouped = [[next(replies) for _ in range(count)] for _ in asked]
        texts = [[reply.said for reply in group] for group in grouped]
        return texts, [[reply.ended for reply in group] for group in grouped]

    def _sample(self, asked: list[Question]) -> tuple[list[list[str]], list[list[bool]]]:
        """Texts of the answers to each question, and whether each ended by itself."""
        import torch

        from rlhf.sampling import generate, uniform_noise

        began = time.perf_counter()
        policy, count = self.policy, self.options.samples_per_prompt
        texts: list[list[str]] = [[] for _ in asked]
        ended: list[list[bool]] = [[] for _ in asked]
        for budget in sorted({question.budget for question in asked}):
            part = [i for i, question in enumerate(asked) if question.budget == budget]
            noise = None
            if policy.temperature:
                keys = [(self.options.seed, asked[i].number) for i in part]
                noise = torch.cat([uniform_noise(key, range(count), budget) for key in keys])
            sampling = dataclasses.replace(policy.sampling, max_new_tokens=budget)
            prompts = [asked[i].ids for i in part for _ in range(count)]
            made = generate(policy.model, prompts, sampling, noise, self.options.batch_size)
            owners = [i for i in part for _ in range(count)]
            for i, ids, finished in zip(owners, made.ids, made.finished, strict=True):
                texts[i].append(policy.text(ids))
                ended[i].append(finished)
                self.num_tokens += len(ids)
        self.seconds += time.perf_counter() - began
        return texts, ended

    def _best(
        self, asked: list[Question], texts: list[list[str]], ended: list[list[bool]]
    ) -> list[dict[str, Any]]:
        """The answer to each question that the reward model scores highest."""
        from rlhf.scorers import score_responses

        count = self.options.samples_per_prompt
        prompts = [question.prompt for question in asked for _ in range(count)]
        scores = score_responses(self.scorer, prompts, sum(texts, []), "best_of")
        self.num_cut += int(scores.cut.sum()) if scores.cut is not None else 0
        rows = []
        for i, of_question in enumerate(scores.total.view(len(asked), count)):
            best = int(of_question.argmax())
            row = {"response": texts[i][best], "ended": ended[i][best]}
            rows.append(row | {"best_of_score": float(of_question[best])})
        return rows
