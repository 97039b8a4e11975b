"""Score the rows of a file with a trained reward model, or serve it to others.

    python -m rlhf.score path=runs/mine/reward/final data=answers.jsonl
    python -m rlhf.score path=my_module.my_score data=answers.jsonl
    python -m rlhf.score path=runs/mine/reward/final serve=127.0.0.1:8123
    python -m rlhf.score path=http://127.0.0.1:8123/score data=answers.jsonl
    python -m rlhf.score path=judge:helpfulness model=<name> url=<endpoint> data=answers.jsonl

With data= it writes `answers.scored.jsonl`: the same rows, in the same order, each with its score.
Rows are JSON objects, one per line: `prompt` and `response` (or `messages` that end with the
assistant) get a `score`; `prompt` and `responses` get `scores`, for best-of-n. Prompts are text or
messages. A Python scorer, or a server, gets the other fields of the rows as columns. A stopped
command continues when it is given again.

With serve= it scores for others over HTTP (docs/scorers.md) until Ctrl-C. Left out: several
processes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlhf.config import (
    DTYPES,
    NORMALIZATIONS,
    EndpointConfig,
    InputError,
    ScorerConfig,
    has_weights,
    is_judge,
    knob,
    refuse,
    show,
)
from rlhf.console import quiet_libraries, say, table
from rlhf.data import DropRow, as_messages, as_prompt, as_text
from rlhf.data.read import LONGEST_ROW, too_long
from rlhf.inputs import Check, check_scorer, failures
from rlhf.option_parser import check_options, run_command
from rlhf.row_file import RowFile, chunks_of, new_file, refuse_rows
from rlhf.rubrics import read_rubric

KINDS = ({"prompt", "response"}, {"prompt", "responses"}, {"messages"})  # fields of a row


@dataclass(kw_only=True)
class ScoreOptions(EndpointConfig):
    """The command line."""

    path: str
    """final/ of a reward stage, any sequence classifier with one label, a Python function as
    module.function, the URL of a remote scorer, or judge:<rubric>."""
    data: str | None = None
    """Rows to score, a .jsonl file."""
    serve: str | None = None
    """Address to score at for others, such as 127.0.0.1:8123, in place of data."""
    out: str | None = None
    """File to write (default: <name>.scored.jsonl in the folder of the rows)."""
    normalize: str = knob(ScorerConfig().normalize, choices=NORMALIZATIONS)
    """Scale of the scores."""
    batch_size: int = knob(ScorerConfig().batch_size, ge=1)
    """Sequences scored together, or sent in one request."""
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
    """Score the file and print a summary; all rows are examined before any is scored."""
    check_options(options)
    if options.data and options.serve:
        raise InputError("give data=<rows> or serve=<address>, not both")
    source, code = Path(options.data or ""), options.trust_remote_code
    if not (options.data or options.serve):
        raise InputError("data is missing; add data=<rows to score>, or serve=127.0.0.1:8123")
    checks: list[Check] = [partial(read_rows, source)] if options.data else []
    checks.append(partial(check_scorer, options.path, options, "path", code))
    refuse([*failures(checks)])
    quiet_libraries()
    if options.serve:
        serve(options)
        return
    import torch

    out = Path(options.out or source.with_suffix(".scored.jsonl"))
    with new_file(out):
        written = _score_file(options, source, out)
    lists = (row.get("scores") or [row["score"]] for row in written if "not_answered" not in row)
    scores = torch.tensor(list(chain.from_iterable(lists)))
    figures = [scores.mean(), scores.std(unbiased=False), scores.min(), scores.max()]
    header = ("responses", "mean", "std", "min", "max")
    say(table([(len(scores), *map(float, figures))], header))
    left_out = sum("not_answered" in row for row in written)
    without = f"; {left_out} rows that were not answered have none" if left_out else ""
    say(f"\nsaved {out}: scores by {_described(options)}{without}")


def _described(options: ScoreOptions) -> str:
    scale = f", normalize={options.normalize}" if has_weights(options.path) else ""
    return f"{options.path}{scale}"


def serve(options: ScoreOptions) -> None:
    """Score for others until Ctrl-C."""
    from rlhf.scorers import ScoreServer

    server = ScoreServer(None, str(options.serve), options.path)  # a bad address is found first
    server.scorer = _load(options)
    say(f"scoring at {server.url} with {_described(options)}; Ctrl-C ends it")
    say(f"  python -m rlhf.ppo scorer.path={server.url} ...")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say(f"ended; {server.num_scored} responses were scored")
    finally:
        server.server_close()


def _load(options: ScoreOptions) -> Any:
    from rlhf.distributed import default_device
    from rlhf.scorers import load_scorer

    config = ScorerConfig(options.path, options.normalize, options.batch_size, endpoint=options)
    code = options.trust_remote_code
    return load_scorer(config, default_device(), options.dtype, "path", code)


def _score_file(options: ScoreOptions, source: Path, out: Path) -> list[dict[str, Any]]:
    """Score the rows of `source` into `out`; return the written rows."""
    from rlhf.checkpoint import hash_weights
    from rlhf.scorers import RewardModelScorer, judges, uncut_scores

    rows, digest = read_rows(source)
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
    if is_judge(options.path):
        rubric = read_rubric(options.path, "path").digest
        made_from |= {"sha256 of the rubric": rubric, "model": options.model}
    file = RowFile(out, made_from)
    scorer, name = _load(options), f"path={options.path}"
    if isinstance(scorer, RewardModelScorer):
        name = "the reward model"
        _require_fitting(rows, scorer, source)

    def score(chunk: range) -> Iterator[dict[str, Any]]:
        part = rows[chunk.start : chunk.stop]
        prompts = [row.prompt for row in part for _ in row.responses]
        responses = [response for row in part for response in row.responses]
        columns = columns_of(part)
        found = iter(uncut_scores(scorer, prompts, responses, name, columns).tolist())
        for row in part:
            if not row.responses:
                yield row.content
                continue
            scores = list(islice(found, len(row.responses)))
            is_list = row.content.get("responses") is not None
            yield row.content | ({"scores": scores} if is_list else {"score": scores[0]})

    chunks = chunks_of([len(row.responses) for row in rows], options.batch_size)
    written = file.write(chunks, score, len(rows), "row")
    for judge in judges(scorer):
        say(f"{judge.summary()}\n")
    return written


def columns_of(rows: Sequence[ScoredRow]) -> dict[str, list[Any]]:
    """The other fields of the rows: name -> a value for each response."""
    names = dict.fromkeys(name for row in rows for name in row.content)
    return {
        name: [row.content.get(name) for row in rows for _ in row.responses]
        for name in names
        if not any(name in kind for kind in KINDS)
    }


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
                if len(line) > LONGEST_ROW:
                    raise too_long(len(line))
                rows.append(_read_row(number, line))
            except (ValueError, RecursionError, DropRow) as error:
                problems.append(f"line {number}: {_reason(error)}")
    refuse_rows(problems, f"data={source}, nothing was scored")
    if not any(row.responses for row in rows):
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
    if "not_answered" in given:  # by `rlhf.generate`, which says why
        return ScoredRow(number, row, "", [])
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
            lengths = [len(scorer.encode(row.prompt, r)) for r in row.responses]
        except InputError as error:
            problems.append(f"line {row.line}: {error}")
            continue
        longest = max(lengths, default=0)
        if longest > scorer.max_length:
            problems.append(
                f"line {row.line}: {longest} tokens, but the context of {scorer.path} is "
                f"{scorer.max_length}"
            )
    refuse_rows(problems, f"data={source}, nothing was scored")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
