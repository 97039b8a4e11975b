"""The files that stages read, made from a store: the same judgements give the same bytes.

    rankings.jsonl                  for rlhf.reward dataset=ranked: one row per ranking
    rankings.demonstrations.jsonl   for rlhf.sft: answers that people wrote
    rankings.conversations.jsonl    for rlhf.sft: conversations that people wrote, both sides

Rankings of flagged prompts are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.rank.store import Judgement, Store


def export(store: Store, out: Path) -> None:
    """Write the files; a reader sees the old or the new one, never a part."""
    judgements = store.judgements()
    _write(out, ranked_rows(judgements))
    written = [[*demonstration_rows(judgements)], store.conversations()]
    for file, rows in zip(written_files(out), written, strict=True):
        if rows or file.exists():  # an empty one if the only one was undone
            _write(file, rows)


def written_files(out: Path) -> list[Path]:
    """Where answers and conversations that people wrote are, next to the rankings."""
    return [
        out.with_name(f"{out.stem}.{name}.jsonl") for name in ("demonstrations", "conversations")
    ]


def ranked_rows(judgements: Sequence[Judgement]) -> Iterable[dict[str, Any]]:
    """Rows of rankings, in the order of their submission."""
    flagged = {one.task.number for one in judgements if one.kind == "flag"}
    for one in judgements:
        if one.kind == "ranking" and one.task.number not in flagged:
            task = one.task
            row = {"prompt": task.prompt, "responses": task.responses, "ranks": one.ranks}
            if task.models:
                row["models"] = task.models
            yield task.kept | row | {"annotator": one.annotator}


def demonstration_rows(judgements: Iterable[Judgement]) -> Iterable[dict[str, Any]]:
    """Rows of answers that people wrote: `prompt` and `completion`, both texts or conversations."""
    for one in judgements:
        prompt, text = one.task.prompt, one.demonstration
        if text is None or one.kind == "flag":
            continue
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        yield {"prompt": prompt, "completion": completion, "annotator": one.annotator}


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    from rlhf.checkpoint.disk import write_whole

    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
