"""Score the rows of a file with a trained reward model.

    python -m rlhf.reward score=answers.jsonl path=runs/mine/reward/final

writes `answers.scored.jsonl`: the same rows, in the same order, each with its score. Rows are JSON
objects, one per line: `prompt` and `response` (or `messages`, the last of the assistant) get a
`score`; `prompt` and `responses` get `scores`, for best-of-n. Prompts are text or messages.

A stopped command continues when it is given again: until all is done, the rows stand in
`<out>.partial`, and what they were made from in `<out>.partial.json`. Left out: Python scorers and
several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint import disk_errors, hash_weights, locked
from rlhf.cli import exit_status
from rlhf.config import InputError, ScorerConfig, nearest, show
from rlhf.config.knobs import DTYPES, NORMALIZATIONS
from rlhf.console import progress_bar, quiet_libraries, say, table
from rlhf.data.rows import DropRow, as_messages, as_prompt, as_text
from rlhf.scorers import RewardModelScorer, checked_scores

KEYS = {
    "score": "rows to score, a .jsonl file",
    "path": "final/ of a reward stage, or any one-label sequence classifier",
    "out": "file to write (default: beside the rows, <name>.scored.jsonl)",
    "normalize": f"one of {', '.join(NORMALIZATIONS)} (default: {ScorerConfig().normalize})",
    "batch_size": f"sequences scored together (default: {ScorerConfig().batch_size})",
    "dtype": f"of the weights, one of {', '.join(DTYPES)} (default: float32)",
    "trust_remote_code": "true: the model's own Python files may run (default: false)",
}
KINDS = ({"prompt", "response"}, {"prompt", "responses"}, {"messages"})  # fields of a row
CHUNK = 8  # batches between two writes
NUM_SHOWN = 10  # bad rows


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
    """Score as the arguments say; return the exit status."""
    return exit_status(lambda: run(arguments), "interrupted; the same command continues")


def run(arguments: list[str]) -> None:
    """Parse `key=value` arguments, score, sum up."""
    settings = parse(arguments)
    source = Path(settings["score"])
    out = Path(settings.get("out") or source.with_suffix(".scored.jsonl"))
    batch_size = int(settings.get("batch_size", ScorerConfig().batch_size))
    normalize = settings.get("normalize", ScorerConfig().normalize)
    config = ScorerConfig(settings["path"], normalize, batch_size)
    quiet_libraries()
    code = settings.get("trust_remote_code") == "true"
    scores = torch.tensor(score_file(source, out, config, settings.get("dtype", "float32"), code))
    figures = [scores.mean(), scores.std(unbiased=False), scores.min(), scores.max()]
    header = ("responses", "mean", "std", "min", "max")
    say(table([(len(scores), *map(float, figures))], header))
    say(f"\nsaved {out}: scores by {config.path}, normalize={normalize}")


def parse(arguments: list[str]) -> dict[str, str]:
    """Read `key=value` arguments.

    Raises:
        InputError: an unknown key, a missing one, or a value that is not allowed.
    """
    settings = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            known = "\n".join(f"  {name}={meaning}" for name, meaning in KEYS.items())
            raise InputError(
                f"with score=, {argument!r} is not understood.{nearest(key, KEYS)} Known are:\n"
                f"{known}"
            )
        settings[key] = value
    for key in ("score", "path"):
        if not settings.get(key):
            raise InputError(f"{key} is missing: {key}=<{KEYS[key]}>")
    choices = {
        "normalize": NORMALIZATIONS,
        "dtype": DTYPES,
        "trust_remote_code": ("true", "false"),
    }
    for key, allowed in choices.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise InputError(f"{key} must be one of {', '.join(allowed)}, got {settings[key]!r}")
    batch_size = settings.get("batch_size", "1")
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise InputError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    return settings


def score_file(
    source: Path,
    out: Path,
    config: ScorerConfig,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> list[float]:
    """Score a file; see the top of this module.

    Returns:
        Every score, in the order of the rows.

    Raises:
        InputError: the output is there already, another process writes it, a row cannot be scored,
            or what was begun belongs to other rows or another reward model. Rows are checked before
            any is scored.
    """
    if not out.parent.is_dir():
        raise InputError(f"out={out}: there is no directory {out.parent}; make it")
    lock, fix = out.with_name(f".{out.name}.lock"), "wait, or give another out=<file>"
    with locked(lock, f"out={out}", fix), disk_errors(out.parent, "give the same command again"):
        return _score_alone(source, out, config, dtype, trust_remote_code)


def _score_alone(
    source: Path, out: Path, config: ScorerConfig, dtype: str, trust_remote_code: bool
) -> list[float]:
    """As `score_file`, with the output locked."""
    if os.path.lexists(out):
        raise InputError(f"out={out} exists already; delete it, or give another out=<file>")
    rows, digest = read_rows(source)
    partial = out.with_name(out.name + ".partial")
    directory = Path(str(config.path))
    made_from = {
        "rows": len(rows),
        "sha256 of the rows": digest,
        "path": config.path,
        "sha256 of the weights": hash_weights(directory) if directory.is_dir() else None,
        "normalize": config.normalize,
        "batch_size": config.batch_size,
        "dtype": dtype,
    }
    done = _begun(partial, made_from)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = RewardModelScorer(config, device, dtype, "path", trust_remote_code)
    _check_encoding(rows, scorer, source)
    if not partial.exists():
        _identity(partial).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    if done:
        say(f"continuing {partial} after {len(done)} of {len(rows)} rows")
    scores = [score for row_scores in done for score in row_scores]
    bar = progress_bar(sum(len(row.responses) for row in rows), len(scores), "response")
    with partial.open("a", encoding="utf-8") as stream:
        for chunk in _chunks(rows, CHUNK * config.batch_size):
            if chunk.stop <= len(done):
                continue
            # a chunk is always scored as a whole: a stopped run ends with the same numbers
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
    os.replace(partial, out)
    _identity(partial).unlink()
    return scores


def read_rows(source: Path) -> tuple[list[ScoredRow], str]:
    """Read and check the rows of a file; return them and the SHA-256 of the file.

    Raises:
        InputError: no such file, no rows, or rows that are named with their line.
    """
    if not source.is_file():
        raise InputError(f"score={source} is not a file; give the rows as a .jsonl file")
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"score={source} cannot be read: {error.strerror}") from error
    if data.startswith(b"\x1f\x8b"):
        raise InputError(f"score={source} is a gzip file; unpack it: gunzip -k {source}")
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
            except ValueError as error:  # a whole number with more digits than Python reads
                problems.append(f"line {number}: {error}")
    _refuse(problems, source)
    if not rows:
        raise InputError(f"score={source} has no rows")
    return rows, hashlib.sha256(data).hexdigest()


def _read_row(number: int, line: bytes) -> ScoredRow:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise InputError(f"got {show(row)}; expected an object with named fields")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    given = {name for name, value in row.items() if value is not None}
    if taken := given & {"score", "scores"}:
        raise InputError(f"the field {taken.pop()!r} is there already; rename it")
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


def _check_encoding(rows: list[ScoredRow], scorer: RewardModelScorer, source: Path) -> None:
    """Check that the reward model's template takes every row, and its context every length."""
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
        raise InputError(f"score={source}, nothing was scored:\n  {listed}")


def _identity(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _begun(partial: Path, made_from: dict[str, Any]) -> list[list[float]]:
    """Scores of the rows in a file that was begun; what a kill cut short in it is cut off."""
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
        raise InputError(f"{partial} was begun with something else; {fix}:\n  {listed}")
    os.truncate(partial, len(whole))
    return scores


def _chunks(rows: list[ScoredRow], size: int) -> Iterator[range]:
    """Cut rows into runs of at least `size` responses."""
    start, count = 0, 0
    for i, row in enumerate(rows):
        count += len(row.responses)
        if count >= size or i == len(rows) - 1:
            yield range(start, i + 1)
            start, count = i + 1, 0


def _score(scorer: RewardModelScorer, rows: list[ScoredRow]) -> list[list[float]]:
    prompts = [row.prompt for row in rows for _ in row.responses]
    responses = [response for row in rows for response in row.responses]
    scores = iter(checked_scores(scorer, prompts, responses, "the reward model").tolist())
    return [[next(scores) for _ in row.responses] for row in rows]
