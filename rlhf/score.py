"""Score the rows of a file with a trained reward model.

    python -m rlhf.score path=runs/mine/reward/final data=answers.jsonl

writes `answers.scored.jsonl`: the same rows, in the same order, each with its score. Rows are JSON
objects, one per line: `prompt` and `response` (or `messages` that end with the assistant) get a
`score`; `prompt` and `responses` get `scores`, for best-of-n. Prompts are text or messages.

A stopped command continues when it is given again: until all rows are scored, they are in
`<out>.partial`, and `<out>.partial.json` says what they were made from. Left out: Python scorers
and several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import DTYPES, NORMALIZATIONS, InputError, ScorerConfig, knob, show
from rlhf.data import DropRow, as_messages, as_prompt, as_text
from rlhf.options import check_options, run_command

KINDS = ({"prompt", "response"}, {"prompt", "responses"}, {"messages"})  # fields of a row
CHUNK = 8  # batches between two writes
NUM_SHOWN = 10  # bad rows


@dataclass
class ScoreOptions:
    """The command line."""

    path: str
    """final/ of a reward stage, or any sequence classifier with one label."""
    data: str
    """Rows to score, a .jsonl file."""
    out: str | None = None
    """File to write (default: <name>.scored.jsonl in the folder of the rows)."""
    normalize: str = knob(ScorerConfig().normalize, choices=NORMALIZATIONS)
    """Scale of the scores."""
    batch_size: int = knob(ScorerConfig().batch_size, ge=1)
    """Sequences scored together."""
    dtype: str = knob("float32", choices=DTYPES)
    """Type of the weights."""
    trust_remote_code: bool = False
    """true: the model's own Python files may run."""


@dataclass
class ScoredRow:
    """A row of the file, and what is to be scored in it: one response, or a list of them."""

    line: int
    content: dict[str, Any]
    prompt: Any
    responses: list[str]
    is_list: bool

    def with_scores(self, scores: list[float]) -> dict[str, Any]:
        """The row as it is written."""
        return self.content | ({"scores": scores} if self.is_list else {"score": scores[0]})


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    usage, again = str(__doc__), "interrupted; the same command continues"
    return run_command(usage, ScoreOptions, run, arguments, again)


def run(options: ScoreOptions) -> None:
    """Score the file and print a summary.

    Rows are checked before any is scored.

    Raises:
        InputError: a value is not allowed, the output exists already, another process writes it, a
            row cannot be scored, or the partial output belongs to other rows or another model.
    """
    check_options(options)
    import torch

    from rlhf.checkpoint import disk_errors, locked
    from rlhf.console import quiet_libraries, say, table

    quiet_libraries()
    source = Path(options.data)
    out = Path(options.out or source.with_suffix(".scored.jsonl"))
    if not out.parent.is_dir():
        raise InputError(f"out={out}: there is no directory {out.parent}; make it")
    lock, fix = out.with_name(f".{out.name}.lock"), "wait, or give another out=<file>"
    with locked(lock, f"out={out}", fix), disk_errors(out.parent, "give the same command again"):
        scores = torch.tensor(_score_file(options, source, out))
    figures = [scores.mean(), scores.std(unbiased=False), scores.min(), scores.max()]
    header = ("responses", "mean", "std", "min", "max")
    say(table([(len(scores), *map(float, figures))], header))
    say(f"\nsaved {out}: scores by {options.path}, normalize={options.normalize}")


def _score_file(options: ScoreOptions, source: Path, out: Path) -> list[float]:
    """Score the rows of `source` into `out`, which is locked; return every score in order."""

    from rlhf.checkpoint import hash_weights
    from rlhf.console import say
    from rlhf.distributed import default_device
    from rlhf.scorers import RewardModelScorer

    if os.path.lexists(out):
        raise InputError(f"out={out} exists already; delete it, or give another out=<file>")
    rows, digest = read_rows(source)
    partial, directory = out.with_name(out.name + ".partial"), Path(options.path)
    made_from = {
        "rows": len(rows),
        "sha256 of the rows": digest,
        "path": options.path,
        "sha256 of the weights": hash_weights(directory) if directory.is_dir() else None,
        "normalize": options.normalize,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
    }
    done = _scores_so_far(partial, made_from)
    device = default_device()
    config = ScorerConfig(options.path, options.normalize, options.batch_size)
    scorer = RewardModelScorer(config, device, options.dtype, "path", options.trust_remote_code)
    _check_encoding(rows, scorer, source)
    if not partial.exists():
        _identity(partial).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    if done:
        say(f"continuing {partial} after {len(done)} of {len(rows)} rows")
    scores = _append_scores(partial, rows, scorer, done, CHUNK * options.batch_size)
    os.replace(partial, out)
    _identity(partial).unlink()
    return scores


def _append_scores(
    partial: Path, rows: list[ScoredRow], scorer: Any, done: list[list[float]], chunk_size: int
) -> list[float]:
    """Score the rows after the `done` ones and append them to the file; return all scores."""
    from rlhf.console import progress_bar

    scores = [score for row_scores in done for score in row_scores]
    bar = progress_bar(sum(len(row.responses) for row in rows), len(scores), "response")
    with partial.open("a", encoding="utf-8") as stream:
        for chunk in _chunks(rows, chunk_size):
            if chunk.stop <= len(done):
                continue
            # the whole chunk is scored again, so that a stopped run ends with the same numbers
            found = _score(scorer, rows[chunk.start : chunk.stop])
            for i in range(max(chunk.start, len(done)), chunk.stop):
                row_scores = found[i - chunk.start]
                written = rows[i].with_scores(row_scores)
                stream.write(json.dumps(written, ensure_ascii=False) + "\n")
                scores += row_scores
                bar.update(len(row_scores))
            stream.flush()
        os.fsync(stream.fileno())
    bar.close()
    return scores


def read_rows(source: Path) -> tuple[list[ScoredRow], str]:
    """Read and check the rows of a file; return them and the SHA-256 of the file.

    Raises:
        InputError: the file does not exist or has no rows, or rows are bad (with their lines).
    """
    if not source.is_file():
        raise InputError(f"data={source} is not a file; give the rows as a .jsonl file")
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"data={source} cannot be read: {error.strerror}") from error
    if data.startswith(b"\x1f\x8b"):
        raise InputError(f"data={source} is a gzip file; unpack it: gunzip -k {source}")
    rows, problems = [], []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_read_row(number, line))
            except json.JSONDecodeError as error:
                what = f"not valid JSON ({error.msg}, column {error.colno})"
                problems.append(f"line {number}: {what}; expected one object per line")
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                problems.append(f"line {number}: not Unicode text ({error.reason})")
            except RecursionError:
                problems.append(f"line {number}: lists or objects are nested too deeply")
            except InputError as error:
                problems.append(f"line {number}: {error}")
            except DropRow as reason:
                problems.append(f"line {number}: {reason}, which a reward model cannot read")
            except ValueError as error:  # an integer with more digits than Python reads
                problems.append(f"line {number}: {error}")
    _refuse(problems, source)
    if not rows:
        raise InputError(f"data={source} has no rows")
    return rows, hashlib.sha256(data).hexdigest()


def _read_row(number: int, line: bytes) -> ScoredRow:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise InputError(f"got {show(row)}; expected an object with named fields")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    given = {name for name, value in row.items() if value is not None}
    if taken := given & {"score", "scores"}:
        raise InputError(f"the row has a field {taken.pop()!r} already; rename it")
    if given & {"prompt", "response", "responses", "messages"} not in KINDS:
        raise InputError(
            "expected `prompt` and `response`, `prompt` and `responses`, or `messages`; the row "
            f"has {', '.join(sorted(given)) or 'no fields'}"
        )
    if "messages" in given:
        messages = as_messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise InputError("the last of `messages` must be the assistant's")
        _check_start(messages[:-1])
        return ScoredRow(number, row, messages[:-1], [messages[-1]["content"]], is_list=False)
    prompt = as_prompt(row["prompt"], "prompt")
    if isinstance(prompt, list):
        _check_start(prompt)
    if "response" in given:
        return ScoredRow(number, row, prompt, [as_text(row["response"], "response")], is_list=False)
    if not isinstance(row["responses"], list) or not row["responses"]:
        raise InputError(f"field 'responses': got {show(row['responses'])}; expected some texts")
    responses = [as_text(r, f"responses[{i}]") for i, r in enumerate(row["responses"])]
    return ScoredRow(number, row, prompt, responses, is_list=True)


def _check_start(prompt: list[dict[str, str]]) -> None:
    if [m["role"] for m in prompt if m["role"] != "system"][:1] != ["user"]:
        raise InputError("the conversation before the response does not start with a user turn")


def _check_encoding(rows: list[ScoredRow], scorer: Any, source: Path) -> None:
    """Check that every row fits the reward model's chat template and its context."""
    problems = []
    for row in rows:
        try:
            longest = max(len(scorer.encode(row.prompt, r)) for r in row.responses)
        except InputError as error:
            problems.append(f"line {row.line}: {error}")
            continue
        if longest > scorer.max_length:
            problems.append(
                f"line {row.line}: {longest} tokens, but the context of {scorer.path} is "
                f"{scorer.max_length}"
            )
    _refuse(problems, source)


def _refuse(problems: list[str], source: Path) -> None:
    if problems:
        more = [f"... and {len(problems) - NUM_SHOWN} more"] if len(problems) > NUM_SHOWN else []
        listed = "\n  ".join([*problems[:NUM_SHOWN], *more])
        raise InputError(f"data={source}, nothing was scored:\n  {listed}")


def _identity(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _scores_so_far(partial: Path, made_from: dict[str, Any]) -> list[list[float]]:
    """Scores of the rows that a stopped command wrote; an incomplete last line is removed."""
    if not partial.exists():
        return []
    fix = f"delete {partial} to start afresh"
    try:
        before = json.loads(_identity(partial).read_text(encoding="utf-8"))
        data = partial.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        written = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        scores = [row["scores"] if "scores" in row else [row["score"]] for row in written]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{partial} cannot be continued ({error}); {fix}") from error
    changed = [
        f"{name}: {before.get(name)} -> {value}"
        for name, value in made_from.items()
        if before.get(name) != value
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise InputError(f"{partial} was begun with other values; {fix}:\n  {listed}")
    os.truncate(partial, len(whole))
    return scores


def _chunks(rows: list[ScoredRow], size: int) -> Iterator[range]:
    """Cut rows into chunks of at least `size` responses."""
    start, count = 0, 0
    for i, row in enumerate(rows):
        count += len(row.responses)
        if count >= size or i == len(rows) - 1:
            yield range(start, i + 1)
            start, count = i + 1, 0


def _score(scorer: Any, rows: list[ScoredRow]) -> list[list[float]]:
    from rlhf.scorers import checked_scores

    prompts = [row.prompt for row in rows for _ in row.responses]
    responses = [response for row in rows for response in row.responses]
    scores = iter(checked_scores(scorer, prompts, responses, "the reward model").tolist())
    return [[next(scores) for _ in row.responses] for row in rows]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
