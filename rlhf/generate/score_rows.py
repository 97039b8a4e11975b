"""Let a language model score the answers of a file that have no score yet (as in ChatLLaMA).

    python -m rlhf.generate mode=score_rows url=http://127.0.0.1:8000/v1 model=Qwen/Qwen3-8B data=answers.jsonl out=scored.jsonl
    python -m rlhf.generate mode=score_rows path=runs/mine/sft/final data=reward_training_data.json

Rows are ChatLLaMA's (`user_input`, `completion`, `score`), or have `prompt` with `response` and
`score`, or with `responses` and `scores`, as `python -m rlhf.generate` writes them. A score that is
missing or null is filled in, on ChatLLaMA's scale of 0 to 5; one that is there stays, also 0. An
answer of the model that is not one number on the scale is asked for again, at most `tries` times;
a row that then has no score is left out and counted. All other columns stay as they are.

`python -m rlhf.reward` reads the result; the last line says how. A stopped command continues when
it is given again; all answers of the model are kept in <out>.answers.sqlite, which may be deleted at
the end. `python -m rlhf.score path=judge:helpfulness` is another scorer of this kind, by rubrics
from 1 to 10, which PPO has too. Left out: several processes.
"""  # noqa: E501

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import InputError, knob, show
from rlhf.console import progress_bar, say
from rlhf.data import BadRow, DropRow, as_prompt, as_text, read_rows, repaired
from rlhf.generate.author import Author, Reply, begun, left_out, refusal, save_rows
from rlhf.generate.options import AuthorOptions
from rlhf.row_file import refuse_rows
from rlhf.rubrics import as_dialogue

TEMPLATE = """\
Below are a request to an assistant and its answer. Score the answer from {lowest} to {highest}: \
{lowest} is useless or does harm, {highest} could not be better. Count whether it does what the \
request asks, whether it is correct and complete, and whether it is clear.

<request>
{prompt}
</request>

<answer>
{response}
</answer>

Write the score, one number from {lowest} to {highest}, and nothing else."""
SHAPES = (  # columns of the prompt, of the answers and of the scores
    ("user_input", "completion", "score"),
    ("prompt", "responses", "scores"),
    ("prompt", "response", "score"),
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")
STRIDE = 2**32  # a try's numbers are apart from those of the tries before


@dataclass(kw_only=True)
class ScoreRowsOptions(AuthorOptions):
    """The command line."""

    data: str
    """Rows to score: a .jsonl, .json, .csv or .parquet file."""
    out: str | None = None
    """File to write (default: <name>.scored.jsonl in the folder of the rows)."""
    template: str | None = None
    """A text file with {prompt} and {response}, that replaces the question to the model."""
    lowest: float = 0
    """Lowest score."""
    highest: float = 5
    """Highest score."""
    tries: int = knob(3, ge=1)
    """Times that the model is asked for a score, until its answer is one."""
    temperature: float | None = knob(0.1, ge=0)
    """0 always takes the likeliest token; more lets a further try differ."""
    response_length: int = knob(256, ge=1)
    """Longest answer of the model, tokens; a model that thinks before it answers needs more."""


@dataclass
class Row:
    """A row of the file; `scores` has None where one is to be found."""

    content: dict[str, Any]
    shape: tuple[str, str, str]
    prompt: Any
    responses: list[str]
    scores: list[float | None]
    last: Reply | None = None  # that was no score

    def scored(self) -> dict[str, Any]:
        """The row with its scores."""
        _, answers, name = self.shape
        return self.content | {name: self.scores if answers == "responses" else self.scores[0]}


@dataclass
class Asked:
    """An answer without a score; `number` counts them over the file."""

    row: Row
    place: int
    number: int = field(default=0)


def run(options: ScoreRowsOptions) -> None:
    """Write the file."""
    if options.lowest >= options.highest:
        raise InputError(f"lowest={options.lowest:g} must be below highest={options.highest:g}")
    template = _template(options)
    with begun(options, options.data, ".scored.jsonl", read_unscored) as (out, rows, author):
        asked = [
            Asked(row, i) for row in rows for i, score in enumerate(row.scores) if score is None
        ]
        for number, one in enumerate(asked):
            one.number = number
        num_again = _score(asked, options, template, author)
        without = [row for row in rows if None in row.scores]
        dropped = Counter(_reason(row, options) for row in without)
        scores = [one.row.scores[one.place] for one in asked]
        found = [score for score in scores if score is not None]
        known = f" ({author.num_known:,} answers known before)" if author.num_known else ""
        line = f"{len(found):,} of {len(asked):,} answers scored{known}, {num_again:,} asked again"
        line += left_out(dropped)
        if last := next((row.last for row in reversed(without) if row.last), None):
            line += f"\n  the last answer that is no score: {show(last.text)}"
        if not found:
            raise InputError(f"nothing was written; {line}")
        save_rows(out, (row.scored() for row in rows if None not in row.scores))
    mean = sum(found) / len(found)
    say(f"{line}\nmean {mean:.2f}, from {min(found):g} to {max(found):g}\nsaved {out}")
    say(f"next: python -m rlhf.reward {_as_dataset(rows)} dataset.path={out} model.path=<model>")


def _as_dataset(rows: Sequence[Row]) -> str:
    """How the reward stage reads the rows."""
    shape = rows[0].shape
    if shape[1] == "responses":
        return "dataset=ranked"
    renamed = "dataset.columns.user_input=prompt dataset.columns.completion=response"
    return "dataset=chatllama_reward" + (f" {renamed}" if shape[0] == "prompt" else "")


# --- Asking ---------------------------------------------------------------------------------------


def _score(asked: Sequence[Asked], options: ScoreRowsOptions, template: str, author: Author) -> int:
    """Ask for all scores, some at a time; return how many were asked for again."""
    num_again = 0
    with progress_bar(len(asked), 0, "answer") as bar:
        for start in range(0, len(asked), author.num_together):
            left = list(asked[start : start + author.num_together])
            bar.update(len(left))
            for again in range(options.tries):
                prompts = [_prompt(one, template, options, author.continues, again) for one in left]
                numbers = [one.number + again * STRIDE for one in left]
                unread = []
                for one, reply in zip(left, author.ask(numbers, prompts), strict=True):
                    score = read_score(reply, options.lowest, options.highest)
                    one.row.scores[one.place] = score
                    if score is None:
                        one.row.last = reply
                        unread.append(one)
                left = [one for one in unread if one.row.last and one.row.last.refused is None]
                if not left:
                    break
                num_again += len(left) if again + 1 < options.tries else 0
    return num_again


def _prompt(
    one: Asked, template: str, options: ScoreRowsOptions, continues: bool, again: int
) -> str:
    values = {"prompt": as_dialogue(one.row.prompt), "response": one.row.responses[one.place]}
    values |= {"lowest": f"{options.lowest:g}", "highest": f"{options.highest:g}"}
    names = "|".join(values)
    # in one pass: a text of the row may have such a name in braces
    text = re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)
    if again:
        text += f"\n\nYour last answer was not one number from {options.lowest:g} to "
        text += f"{options.highest:g}. Write the number alone."
    return text + "\n\nScore:" if continues else text


def read_score(reply: Reply, lowest: float, highest: float) -> float | None:
    """The one number on the scale in an answer: "4", "Score: 4.5" or "4/5"; else None."""
    if reply.refused is not None:
        return None
    scale = rf"\b{lowest:g}\s*(?:-|–|to)\s*{highest:g}\b|(?:/|\bout of)\s*{highest:g}\b"
    found = {float(number) for number in NUMBER.findall(re.sub(scale, " ", reply.said))}
    if len(found) != 1:
        return None
    (score,) = found
    return score if lowest <= score <= highest else None


def _reason(row: Row, options: ScoreRowsOptions) -> str:
    if row.last is not None and row.last.refused is not None:
        return f"without a score (the question {refusal(row.last)})"
    return f"without a score after {options.tries} tries"


# --- Rows and template ----------------------------------------------------------------------------


def read_unscored(source: Path) -> list[Row]:
    """Read the rows of a file."""
    if not source.is_file():
        raise InputError(f"data={source} is not a file")
    rows: list[Row] = []
    problems = []
    for where, raw in read_rows(str(source), "train", "reward", "data"):
        try:
            rows.append(_row(raw))
        except (InputError, DropRow, ValueError) as error:
            problems.append(f"{where}: {error}")
    refuse_rows(problems, f"data={source}, nothing was scored")
    if not rows:
        raise InputError(f"data={source} has no rows")
    if not any(None in row.scores for row in rows):
        raise InputError(f"data={source}: each of the {len(rows):,} rows has its score already")
    if len(shapes := {row.shape for row in rows}) > 1:
        listed = " and ".join(sorted(f"`{prompt}` with `{text}`" for prompt, text, _ in shapes))
        raise InputError(f"data={source} mixes rows of {listed}; give them as two files")
    return rows


def _row(raw: Any) -> Row:
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        raise InputError(f"got {show(raw)}; expected an object with named fields")
    row = repaired(raw, "row", [])
    for shape in SHAPES:
        prompt, answers, name = shape
        if row.get(prompt) is not None and row.get(answers) is not None:
            break
    else:
        names = ", ".join(sorted(name for name in row if row[name] is not None)) or "no fields"
        raise InputError(
            "expected `user_input` and `completion`, or `prompt` with `response` or `responses`; "
            f"the row has {names}"
        )
    texts = row[answers] if answers == "responses" else [row[answers]]
    scores = row.get(name)
    if answers != "responses":
        scores = [scores]
    elif scores is None and isinstance(texts, list):
        scores = [None] * len(texts)
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise InputError(f"`{answers}` and `{name}` must be lists of equal length")
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise InputError(f"`{name}` must be a number or null, got {show(score)}")
    texts = [as_text(text, answers) for text in texts]
    return Row(row, shape, as_prompt(row[prompt], prompt), texts, list(scores))


def _template(options: ScoreRowsOptions) -> str:
    """The question to the model: our own, or that of a file."""
    if options.template is None:
        return TEMPLATE
    file = Path(options.template).expanduser()
    if not file.is_file():
        raise InputError(f"template={file} is not a file")
    text = file.read_text(encoding="utf-8", errors="replace")
    for name in ("{prompt}", "{response}"):
        if name not in text:
            raise InputError(f"template={file} does not show {name}; add it where it belongs")
    return text
