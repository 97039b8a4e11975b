"""Let a model write new tasks after the pattern of a few (Self-Instruct, as in Stanford Alpaca).

    python -m rlhf.generate mode=self_instruct url=http://127.0.0.1:8000/v1 model=Qwen/Qwen3-8B seeds=seeds.jsonl num_rows=1000 out=tasks.jsonl
    python -m rlhf.generate mode=self_instruct path=runs/mine/sft/final seeds=seeds.jsonl

The model sees three of the seeds, drawn at random, and completes a list of 20 tasks. Tasks that are
cut off, too short or long, ask for what text cannot give, or are too similar to an earlier one are
left out and counted. Rows of the output have `instruction`, `input` and `output`, which
`python -m rlhf.sft` reads as they are, and `most_similar`, the earlier instruction that is the most
similar to theirs, with its ROUGE-L F as `similarity`.

Seeds are rows with `instruction` and `output`, and `input` where there is one; those of Self-Instruct
(`instances`) and Dolly (`context`, `response`) are read too. Without
mode=self_instruct, the command answers a file of prompts.

A stopped command continues when it is given again; all answers of the model are kept in
<out>.answers.sqlite, which may be deleted at the end. Left out: several processes.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import InputError, knob
from rlhf.console import progress_bar, say, warn
from rlhf.data import read_rows
from rlhf.generate.author import Author, Reply, begun, left_out, refusal, save_rows
from rlhf.generate.options import AuthorOptions
from rlhf.generate.written_tasks import (
    BLACKLIST,
    Earlier,
    Rules,
    Task,
    prompt_of_list,
    read_list,
    require_rapidfuzz,
)
from rlhf.row_file import refuse_rows


@dataclass(kw_only=True)
class SelfInstructOptions(AuthorOptions):
    """The command line."""

    seeds: str
    """Tasks to begin with: a .jsonl, .json, .csv or .parquet file."""
    out: str | None = None
    """File to write (default: <name>.new.jsonl in the folder of the seeds)."""
    num_rows: int = knob(100, ge=1)
    """New tasks to write."""
    num_seeds: int = knob(3, ge=1)
    """Seeds that a prompt shows."""
    list_length: int = knob(20, ge=2)
    """Number at which the list ends: the model completes the tasks after the seeds, before this
    number."""
    similarity: float = knob(0.7, gt=0, le=1)
    """An instruction with this ROUGE-L F or more to a seed or an earlier task is left out."""
    min_words: int = knob(4, ge=1)
    """Shortest instruction, words."""
    max_words: int = knob(150, ge=1)
    """Longest instruction, words."""
    blacklist: list[str] = knob(BLACKLIST)
    """Words that no instruction may have; [] for none (default: image, graph, file, draw, video and
    others of what text cannot give)."""
    keep_non_ascii: bool = False
    """true: an instruction may begin with a letter outside ASCII."""
    patience: int = knob(20, ge=1)
    """Answers in a row without a new task after which the command ends."""
    response_length: int = knob(3072, ge=1)
    """Longest answer, tokens: a whole list; less where the prompt leaves less of the context."""


def run(options: SelfInstructOptions) -> None:
    """Write the file."""
    if options.list_length < options.num_seeds + 2:
        raise InputError(
            f"list_length={options.list_length} leaves no room after num_seeds="
            f"{options.num_seeds}; give list_length={options.num_seeds + 2} or more"
        )
    require_rapidfuzz()
    read = partial(read_seeds, options=options)
    with begun(options, options.seeds, ".new.jsonl", read) as (out, seeds, author):
        author.stop = [f"\n{options.list_length}."]
        writer = Writer(options, seeds, author)
        if not save_rows(out, _with_bar(writer)):
            raise InputError(f"no task passed; {writer.summary()}")
    if writer.num_kept < options.num_rows:
        warn(
            f"{options.patience} answers in a row had no new task, so that there are "
            f"{writer.num_kept:,} of {options.num_rows:,}; give more seeds or a higher temperature"
        )
    say(f"{writer.summary()}\nsaved {out}")


def _with_bar(writer: Writer) -> Iterator[dict[str, Any]]:
    with progress_bar(writer.options.num_rows, 0, "task") as bar:
        for row in writer.rows():
            bar.update(1)
            yield row


class Writer:
    """Asks for lists, and keeps the tasks that pass.

    Attributes:
        num_kept: tasks that passed.
        num_answers: answers that were read.
        dropped: tasks that did not pass, and answers without any, by reason.
    """

    def __init__(self, options: SelfInstructOptions, seeds: list[Task], author: Author):
        self.options, self.seeds, self.author = options, seeds, author
        self.rules = Rules(
            options.min_words, options.max_words, options.blacklist, options.keep_non_ascii
        )
        self.earlier = Earlier([seed.instruction for seed in seeds])
        self.num_kept = self.num_answers = 0
        self.dropped: Counter[str] = Counter()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows, until there are enough or the model finds no new ones."""
        fruitless = 0
        for reply in self._replies():
            before = self.num_kept
            self.num_answers += 1
            for row in self._new_rows(reply):
                yield row
                if self.num_kept == self.options.num_rows:
                    return
            fruitless = 0 if self.num_kept > before else fruitless + 1
            if fruitless == self.options.patience:
                return

    def _replies(self) -> Iterator[Reply]:
        first, count = 0, self.author.num_together
        while True:
            numbers = range(first, first + count)
            yield from self.author.ask(numbers, [self._prompt(number) for number in numbers])
            first += count

    def _prompt(self, number: int) -> str:
        """The prompt of a number; it depends on the seeds and the option `seed` alone."""
        draw = np.random.default_rng([self.options.seed, number])
        chosen = draw.choice(len(self.seeds), self.options.num_seeds, replace=False)
        examples = [self.seeds[i] for i in chosen]
        return prompt_of_list(examples, self.options.list_length, self.author.continues)

    def _new_rows(self, reply: Reply) -> Iterator[dict[str, Any]]:
        options = self.options
        tasks: list[Task] = []
        first, continues = options.num_seeds + 1, self.author.continues
        read = read_list(reply.text, first, options.list_length, continues, reply.ended)
        if not read:
            self.dropped[f"answers without a task ({refusal(reply) or 'no list in them'})"] += 1
        for task in read:
            fault = task if isinstance(task, str) else self.rules.fault(task)
            if fault is not None:
                self.dropped[fault] += 1
            elif isinstance(task, Task):
                tasks.append(task)
        before = len(self.earlier)
        found = list(self.earlier.closest([task.instruction for task in tasks]))
        for task, best in zip(tasks, found, strict=True):
            if len(self.earlier) > before:  # also those of this answer
                best = max(best, *self.earlier.closest([task.instruction], before))
            if best[0] >= options.similarity:
                self.dropped[f"too similar to an earlier one (>= {options.similarity:g})"] += 1
                continue
            self.earlier.add(task.instruction)
            self.num_kept += 1
            yield task._asdict() | {"most_similar": best[1], "similarity": round(best[0], 4)}

    def summary(self) -> str:
        """What was asked, kept and dropped."""
        author = self.author
        known = f" ({author.num_known:,} known before)" if author.num_known else ""
        answers = f"{self.num_answers:,} answers{known}"
        return f"{self.num_kept:,} new tasks from {answers}{left_out(self.dropped)}"


# --- Seeds ----------------------------------------------------------------------------------------


def read_seeds(source: Path, options: SelfInstructOptions) -> list[Task]:
    """Read the seeds; a row may have those names that the known data sets have."""
    if not source.is_file():
        raise InputError(f"seeds={source} is not a file")
    seeds, problems = [], []
    for where, row in read_rows(str(source), "train", "sft", "seeds"):
        task = _seed(row)
        if task is None:
            got = ", ".join(row) if isinstance(row, dict) else str(row)
            problems.append(f"{where}: expected texts `instruction` and `output`; got {got}")
        else:
            seeds.append(task)
    refuse_rows(problems, f"seeds={source}, nothing was written")
    if len(seeds) < options.num_seeds:
        fix = f"give more, or num_seeds={len(seeds)}" if seeds else "give rows with an instruction"
        raise InputError(
            f"seeds={source} has {len(seeds)} tasks, and a prompt shows {options.num_seeds}; {fix}"
        )
    return seeds


def _seed(row: Any) -> Task | None:
    if not isinstance(row, dict):
        return None
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        row = row | instances[0]
    given = row.get("input") or row.get("context") or ""
    texts = [row.get("instruction"), given, row.get("output") or row.get("response")]
    if not all(isinstance(text, str) for text in texts) or not (texts[0].strip() and texts[2]):
        return None
    return Task(*(text.strip() for text in texts))
