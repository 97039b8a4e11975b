"""From a file of prompts to tasks in a store: answers are sampled, or the rows have them.

Every chunk of answers is saved as it is made, so that a stopped command continues. Left out: the
sampling itself (`rlhf.generate`).
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config import EndpointConfig, InputError, ScorerConfig, show
from rlhf.console import progress_bar, say
from rlhf.generate import Answerer, GenerateOptions, Question, read_prompts
from rlhf.policy import check_policies
from rlhf.rank.options import RankOptions
from rlhf.rank.store import Store, Task
from rlhf.row_file import chunks_of, refuse_rows

MOST = 9  # answers to a prompt: keys 1 to 9
# columns that would contradict the ranks of people
REPLACED = "ranks ratings scale margin probability chosen rejected models annotator".split()
# options that do not change the answers; a store may be opened again with other ones
FREE = {"prompts", "out", "device", "trust_remote_code", "engine", "batch_size", "order"}
FREE |= {"reward_models", "overlap", "annotators", "host", "port", "token", "serve", "scorer"}
FREE |= {field.name for field in dataclasses.fields(EndpointConfig)}  # of the scorer


def read_questions(options: RankOptions) -> tuple[list[Question], str]:
    """Read the prompts and the answers that they have; return them and the SHA-256 of the file."""
    source = Path(options.prompts).expanduser()
    questions, digest = read_prompts(source)
    _check_own_answers(questions, source, options.path)
    return questions, digest


def make_tasks(options: RankOptions, store: Store, questions: list[Question], digest: str) -> None:
    """Fill a store with the tasks of a file, or check that it holds them."""
    source = Path(options.prompts).expanduser()
    _require_same(store, options, digest)
    if not store.fact("complete"):
        for number, path in enumerate(options.path or []):
            _sample(options, store, number, path, questions, source)
        tasks = {question.number: _task(options, store, question) for question in questions}
        asked = [task for task in tasks.values() if isinstance(task, Task)]
        reasons = Counter(task for task in tasks.values() if isinstance(task, str))
        if not asked:
            raise InputError(f"prompts={source} has nothing to rank: {_listed(reasons)}")
        store.add(asked)
        store.set_fact("without", reasons)
        store.set_fact("complete", True)
    if without := store.fact("without"):
        say(f"{sum(without.values()):,} prompts are not shown: {_listed(Counter(without))}")
    _put_in_order(options, store)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({number:,})" for reason, number in reasons.most_common(3))


def _require_same(store: Store, options: RankOptions, digest: str) -> None:
    """Require that a store was made from these prompts, models and settings."""
    from rlhf.checkpoint import hash_weights

    made_from: dict[str, Any] = {"sha256 of the prompts": digest}
    for field in dataclasses.fields(options):
        if options.path and field.name not in FREE:
            made_from[field.name] = getattr(options, field.name)
    for path in options.path or []:
        if Path(path).exists():
            made_from[f"sha256 of the weights of {path}"] = hash_weights(Path(path))
    before = store.fact("made_from")
    if store.is_empty():
        store.set_fact("made_from", made_from)
        return
    names = dict.fromkeys([*before, *made_from])
    changed = [name for name in names if before.get(name) != made_from.get(name)]
    if changed:
        listed = "\n  ".join(f"{n}: {before.get(n)} -> {made_from.get(n)}" for n in changed)
        fix = "give them again, or another out=<file> for new rankings"
        raise InputError(f"{store.file} was begun with other values; {fix}:\n  {listed}")


# --- Answers --------------------------------------------------------------------------------------


def _check_own_answers(questions: list[Question], source: Path, path: list[str] | None) -> None:
    if path is None and all(question.responses is None for question in questions):
        fix = "add path=<policy>, which answers them, or give rows with `responses`"
        raise InputError(f"prompts={source} has no answers to rank; {fix}")
    problems = []
    for question in questions:
        given, row = question.responses, f"row {question.number + 1}"
        texts = isinstance(given, list) and all(isinstance(text, str) for text in given)
        if given is None:
            if path is None and question.not_answered is None:
                problems.append(
                    f"{row}: it has no `responses`; add path=<policy>, which answers the prompts"
                )
        elif given and (not texts or not 2 <= len(given) <= MOST):
            problems.append(f"{row}: `responses` must be 2 to {MOST} texts, got {show(given)}")
    refuse_rows(problems, f"prompts={source}, nothing is shown")


def _sample(
    options: RankOptions,
    store: Store,
    number: int,
    path: str,
    questions: list[Question],
    source: Path,
) -> None:
    """Let one policy answer the prompts that have no answers, and save what it says."""
    asked = [dataclasses.replace(q) for q in questions if q.responses is None]
    done = store.samples(number)
    if len(done) == len(asked):
        return
    num_policies = len(options.path or [])
    count = options.samples_per_prompt // num_policies
    count += number < options.samples_per_prompt % num_policies
    seed = options.seed + number  # the same policy twice gives other answers
    own = {"path": path, "seed": seed, "samples_per_prompt": count}
    own |= {"url": None, "model": None}  # those are the scorer's
    answerer = Answerer(GenerateOptions.like(options, **own))
    say(answerer.policy.describe())
    answerer.prepare(asked, source)
    if done:
        say(f"continuing after {len(done):,} of {len(asked):,} prompts")
    with progress_bar(len(asked), len(done), "prompt") as bar:
        for chunk in chunks_of([count] * len(asked), options.batch_size):
            part = asked[chunk.start : chunk.stop]
            if part[0].number not in done:
                rows = zip(part, answerer(part), strict=True)
                store.save_samples(
                    number, {question.number: _answer(row) for question, row in rows}
                )
                bar.update(len(part))


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    texts = row.get("responses") or [row["response"]]
    return {"prompt": row["prompt"], "texts": texts, "not_answered": row.get("not_answered")}


def _task(options: RankOptions, store: Store, question: Question) -> Task | str:
    """The task of a row, or the reason why people are not asked."""
    if question.not_answered is not None:
        return question.not_answered
    prompt, given = question.prompt, question.responses
    if given == []:
        return "not answered in the file"
    models = question.kept.get("models")
    if given is None:
        found = [store.samples(i)[question.number] for i in range(len(options.path or []))]
        refused = [one["not_answered"] for one in found if one["not_answered"]]
        if refused:
            return str(refused[0])
        prompt, given = found[0]["prompt"], [text for one in found for text in one["texts"]]
        paths = zip(options.path or [], found, strict=True)
        models = [path for path, one in paths for _ in one["texts"]]
    if not isinstance(models, list) or len(models) != len(given):
        models = []
    full = [i for i, text in enumerate(given) if text.strip()]  # nothing trains on an empty answer
    kept = {name: value for name, value in question.kept.items() if name not in REPLACED}
    kept.pop("prompt", None)
    task = Task(
        question.number,
        prompt,
        [given[i] for i in full],
        [str(models[i]) for i in full] if models else [],
        kept,
    )
    return task if len(task.cards()) > 1 else "no two different answers"


# --- Order ----------------------------------------------------------------------------------------


def check_models(options: RankOptions) -> None:
    """Refuse models that cannot be used, before torch is imported."""
    from functools import partial

    from rlhf.config import refuse
    from rlhf.inputs import check_model, failures

    paths = options.path or []
    if paths:
        check_policies(options, {f"path[{i}]" if i else "path": p for i, p in enumerate(paths)})
    if len(paths) > options.samples_per_prompt:
        raise InputError(
            f"samples_per_prompt={options.samples_per_prompt} answers cannot come from "
            f"{len(paths)} policies; add samples_per_prompt={len(paths)}"
        )
    scorers = options.reward_models or []
    if (options.order == "disagreement") != bool(scorers) or len(scorers) == 1:
        raise InputError(
            "order=disagreement and reward_models=[a,b], two or more models that were trained "
            f"apart, go together; got order={options.order} and {len(scorers)} models"
        )
    code = options.trust_remote_code
    checks = [partial(check_model, s, "reward_models", ("reward",), code=code) for s in scorers]
    refuse([*failures(checks)])


def _put_in_order(options: RankOptions, store: Store) -> None:
    order = [options.order, options.reward_models, options.seed]
    if store.fact("order") == order:
        return
    tasks = store.tasks()
    positions: dict[int, float] = {number: number for number in tasks}
    if options.order == "random":
        shuffled = random.Random(options.seed).sample([*tasks], len(tasks))
        positions = {number: position for position, number in enumerate(shuffled)}
    if options.order == "disagreement":
        spreads = [*_disagreements(options, [*tasks.values()])]
        positions = {number: -spread for number, spread in zip(tasks, spreads, strict=True)}
    store.put_in_order(positions)
    store.set_fact("order", order)


def _disagreements(options: RankOptions, tasks: list[Task]) -> Iterator[float]:
    """How far the reward models disagree on the answers to each prompt.

    A score is taken around the mean of its prompt and divided by the model's own spread, so that no
    scale or offset counts. The disagreement is the variance over the models, the mean of the
    answers.
    """
    import numpy as np

    sizes = np.cumsum([len(task.responses) for task in tasks])[:-1]
    columns = []
    for path in options.reward_models or []:
        scores = [s - s.mean() for s in np.split(_scores(options, path, tasks), sizes)]
        flat = np.concatenate(scores)
        columns.append(flat / (flat.std() or 1.0))
    for part in np.split(np.stack(columns), sizes, axis=1):
        yield float(part.var(axis=0).mean())


def _scores(options: RankOptions, path: str, tasks: list[Task]) -> Any:
    from rlhf.distributed import default_device
    from rlhf.scorers import RewardModelScorer, score_responses

    config = ScorerConfig(path, batch_size=options.batch_size)
    device, code = options.device or default_device(), options.trust_remote_code
    scorer = RewardModelScorer(config, device, "float32", "reward_models", code)
    prompts = [task.prompt for task in tasks for _ in task.responses]
    texts = [text for task in tasks for text in task.responses]
    scores = score_responses(scorer, prompts, texts, "reward_models")
    if scores.cut is not None and scores.cut.any():
        say(f"{path} read only the beginning of {int(scores.cut.sum()):,} answers (too long)")
    return scores.total.double().numpy(force=True)
