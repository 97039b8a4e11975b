"""The answers of two models to the same prompts, from the models or from files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import InputError
from rlhf.console import say
from rlhf.data import BadRow, DropRow, as_prompt, read_rows, repaired
from rlhf.evaluate.options import REPORT, EvaluateOptions, is_answers, is_finished
from rlhf.generate import GenerateOptions
from rlhf.generate import run as generate
from rlhf.rubrics import as_dialogue

PROMPT, RESPONSE = ("prompt", "instruction"), ("response", "output")
# what a report depends on, by mode: options, and those of them that may name files
MADE_FROM = {
    "pairwise": (
        "a b prompts gold rubric scorer by model url max_tokens response_length temperature system "
        "seed normalize",
        "a b prompts gold",
    ),
    "rewardbench": ("path data normalize model url max_tokens", "data"),
}


@dataclass
class Pair:
    """A prompt and two answers to it.

    Attributes:
        columns: the other fields of the row, such as `reference`.
    """

    prompt: Any
    a: str
    b: str
    columns: dict[str, Any] = field(default_factory=dict)


def load_pairs(options: EvaluateOptions, folder: Path) -> list[Pair]:
    """The pairs of answers; models answer first, into `folder`.

    Raises:
        InputError: a row without an answer, or a prompt that only one side answered.
    """
    sides = {name: _rows(options, name, folder) for name in ("a", "b")}
    answered: dict[str, dict[str, dict[str, Any]]] = {}
    for name, rows in sides.items():
        answered[name] = {key_of(_first(row, PROMPT)): row for row in rows}
        if len(answered[name]) < len(rows):
            say(f"{name}: {len(rows) - len(answered[name])} prompts occur again; the last counts")
    a, b = answered.values()
    alone = [key for key in {**a, **b} if key not in a or key not in b]
    if alone:
        side = "a" if alone[0] in a else "b"
        raise InputError(
            f"{len(alone)} prompts have an answer on one side only, the first in {side}: "
            f"{alone[0][:100]!r}; give answers to the same prompts"
        )
    both = [key for key in a if "not_answered" not in {**a[key], **b[key]}]
    if len(both) < len(a):
        say(f"{len(a) - len(both)} of {len(a)} prompts were not answered, and are left out")
    if not both:
        raise InputError("no prompt has two answers")
    return [_pair(a[key], b[key]) for key in both]


def _pair(a: dict[str, Any], b: dict[str, Any]) -> Pair:
    prompt = _first(a, PROMPT)
    if not isinstance(prompt, str):
        prompt = [turn for turn in prompt if turn["role"] != "system"]
    texts = _first(a, RESPONSE), _first(b, RESPONSE)
    columns = {name: value for name, value in (b | a).items() if name not in PROMPT + RESPONSE}
    return Pair(prompt, *texts, columns)


def key_of(prompt: Any) -> str:
    """Name a prompt by its text; the system message that a model adds does not matter."""
    if isinstance(prompt, str):
        return prompt.strip()
    return as_dialogue([turn for turn in prompt if turn["role"] != "system"]).strip()


def _rows(options: EvaluateOptions, name: str, folder: Path) -> list[dict[str, Any]]:
    path = str(getattr(options, name))
    file = Path(path)
    if not is_answers(path):
        file = folder / f"{name}.jsonl"
        if not file.is_file():
            _answer(options, path, file)
    rows = []
    for where, row in read_rows(str(file), "train", "ppo", name):
        prompt = prompt_of(row, where, name)
        if not isinstance(_first(row, RESPONSE), str):
            raise InputError(
                f"{name}: {where}: expected `prompt` and `response`; with several answers "
                "to a prompt, give one: rlhf.generate with samples_per_prompt=1"
            )
        rows.append(repaired(row | {"prompt": prompt}, "row", []))
    if not rows:
        raise InputError(f"{name}={file} has no rows")
    return rows


def prompt_of(row: Any, where: str, name: str) -> Any:
    """The prompt of a row, a text or a conversation.

    Args:
        where: place of the row.
        name: option of its file.

    Raises:
        InputError: it has none.
    """
    try:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict) or _first(row, PROMPT) is None:
            raise InputError("expected an object with a `prompt`")
        return as_prompt(_first(row, PROMPT), "prompt")
    except (InputError, DropRow) as error:
        raise InputError(f"{name}: {where}: {error}") from error


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _answer(options: EvaluateOptions, path: str, file: Path) -> None:
    """Let a model answer the prompts."""
    own = {"path": path, "prompts": options.prompts, "out": str(file), "normalize": "none"}
    own |= {"url": None, "model": None}  # those are the judge's
    generate(GenerateOptions.like(options, **own))


# --- Continuing -----------------------------------------------------------------------------------


def begin(options: EvaluateOptions, folder: Path) -> dict[str, Any] | None:
    """Note what the files in a folder are made from; refuse to continue with something else.

    Returns:
        The report of the same command, if it is finished.
    """
    names, files = MADE_FROM[options.mode]
    now: dict[str, Any] = {name: getattr(options, name) for name in names.split()}
    for name in files.split():
        file = Path(str(getattr(options, name)))
        if file.is_file():
            now[f"sha256 of {name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    note = folder / "made_from.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else now
    except (OSError, ValueError) as error:
        raise InputError(f"out={folder} cannot be used ({error})") from error
    changed = [f"{n}: {before.get(n)} -> {now[n]}" for n in now if before.get(n) != now[n]]
    keeps_parts = options.mode == "pairwise" or is_finished(options)
    if changed and keeps_parts:
        listed = "\n  ".join(changed)
        raise InputError(
            f"out={folder} was begun with other values; give another out=<folder>:\n  {listed}"
        )
    note.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    if not is_finished(options):
        return None
    say(f"{folder}/ is finished; this is its report, and another out=<folder> starts a new one\n")
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report
