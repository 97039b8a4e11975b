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
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlhf.config import DTYPES, NORMALIZATIONS, InputError, ScorerConfig, knob, show
from rlhf.console import progress_bar, quiet_libraries, say, table
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
    """A row of the file, and the responses in it that are scored."""

    line: int
    content: dict[str, Any]
    prompt: Any
    responses: list[str]


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    again = "interrupted; the same command continues"
    return run_command(str(__doc__), ScoreOptions, run, arguments, again)


def run(options: ScoreOptions) -> None:
    """Score the file and print a summary; all rows are examined before any is scored.

    Raises:
        InputError: a value is not allowed, the output exists already, another process writes it, a
            row cannot be scored, or the partial output belongs to other rows or another model.
    """
    check_options(options)
    import torch

    from rlhf.checkpoint import disk_errors, locked

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
    from rlhf.distributed import default_device
    from rlhf.scorers import RewardModelScorer

    if os.path.lexists(out):
        raise InputError(f"out={out} exists already; delete it, or give another out=<file>")
    rows, digest = read_rows(source)
    partial, identity = (out.with_name(f"{out.name}.partial{end}") for end in ("", ".json"))
    directory = Path(options.path)
    made_from = {
        "rows": len(rows),
        "sha256 of the rows": digest,
        "path": options.path,
        "sha256 of the weights": hash_weights(directory) if directory.is_dir() else None,
        "normalize": options.normalize,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
    }
    done = _scores_so_far(partial, identity, made_from)
    config = ScorerConfig(options.path, options.normalize, options.batch_size)
    code = options.trust_remote_code
    scorer = RewardModelScorer(config, default_device(), options.dtype, "path", code)
    _require_fitting(rows, scorer, source)
    if not partial.exists():
        identity.write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    if done:
        say(f"continuing {partial} after {len(done)} of {len(rows)} rows")
    scores = _append_scores(partial, rows, scorer, done, CHUNK * options.batch_size)
    os.replace(partial, out)
    identity.unlink()
    return scores


def _append_scores(
    partial: Path, rows: list[ScoredRow], scorer: Any, done: list[list[float]], chunk_size: int
) -> list[float]:
    """Score the rows after the `done` ones and append them to the file; return all scores."""
    from rlhf.scorers import uncut_scores

    scores = list(chain.from_iterable(done))
    bar = progress_bar(sum(len(row.responses) for row in rows), len(scores), "response")
    with partial.open("a", encoding="utf-8") as stream:
        for chunk in _chunks(rows, chunk_size):
            if chunk.stop <= len(done):
                continue
            # the whole chunk is scored again, so that a stopped run ends with the same numbers
            part = rows[chunk.start : chunk.stop]
            prompts = [row.prompt for row in part for _ in row.responses]
            responses = [response for row in part for response in row.responses]
            found = iter(uncut_scores(scorer, prompts, responses, "the reward model").tolist())
            for i, row in enumerate(part, chunk.start):
                row_scores = list(islice(found, len(row.responses)))
                if i >= len(done):
                    is_list = row.content.get("responses") is not None
                    new = {"scores": row_scores} if is_list else {"score": row_scores[0]}
                    stream.write(json.dumps(row.content | new, ensure_ascii=False) + "\n")
                    scores += row_scores
                    bar.update(len(row_scores))
            stream.flush()
        os.fsync(stream.fileno())
    bar.close()
    return scores


def read_rows(source: Path) -> tuple[list[ScoredRow], str]:
    """Read and check the rows of a file; return them and the SHA-256 of the file."""
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
            except (ValueError, RecursionError, DropRow) as error:
                problems.append(f"line {number}: {_reason(error)}")
    _refuse(problems, source)
    if not rows:
        raise InputError(f"data={source} has no rows")
    return rows, hashlib.sha256(data).hexdigest()


def _reason(error: Exception) -> str:
    """Say why a row cannot be read."""
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg}, column {error.colno}"
        return f"not valid JSON ({place}); expected one object per line"
    if isinstance(error, UnicodeError):
        return f"not Unicode text ({getattr(error, 'reason', error)})"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    if isinstance(error, DropRow):
        return f"{error}, which a reward model cannot read"
    return str(error)  # an InputError, or an integer with more digits than Python reads


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
    prompt: Any
    if "messages" in given:
        *prompt, last = as_messages(row["messages"], "messages")
        if last["role"] != "assistant":
            raise InputError("the last of `messages` must be the assistant's")
        responses = [last["content"]]
    else:
        prompt = as_prompt(row["prompt"], "prompt")
        given_responses = row.get("responses")
        if "response" in given:
            responses = [as_text(row["response"], "response")]
        elif isinstance(given_responses, list) and given_responses:
            responses = [as_text(r, f"responses[{i}]") for i, r in enumerate(given_responses)]
        else:
            raise InputError(f"field 'responses': got {show(given_responses)}; expected some texts")
    turns = prompt if isinstance(prompt, list) else [{"role": "user"}]
    if [turn["role"] for turn in turns if turn["role"] != "system"][:1] != ["user"]:
        raise InputError("the conversation before the response does not start with a user turn")
    return ScoredRow(number, row, prompt, responses)


def _require_fitting(rows: list[ScoredRow], scorer: Any, source: Path) -> None:
    """Require that every row fits the reward model's chat template and its context."""
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


def _scores_so_far(partial: Path, identity: Path, made_from: dict[str, Any]) -> list[list[float]]:
    """Scores of the rows that a stopped command wrote; an incomplete last line is removed."""
    if not partial.exists():
        return []
    fix = f"delete {partial} to start afresh"
    try:
        before = json.loads(identity.read_text(encoding="utf-8"))
        data = partial.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        written = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        scores = [row["scores"] if "scores" in row else [row["score"]] for row in written]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{partial} cannot be continued ({error}); {fix}") from error
    changed = {name: value for name, value in made_from.items() if before.get(name) != value}
    if changed:
        listed = "\n  ".join(f"{name}: {before.get(name)} -> {changed[name]}" for name in changed)
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
