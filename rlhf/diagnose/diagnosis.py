"""Diagnose a run from start to end: measure, judge, write, print."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.checkpoint.disk import write_whole
from rlhf.config import InputError
from rlhf.console import quiet_libraries, say
from rlhf.curves import plot_hint
from rlhf.diagnose.options import DiagnoseOptions, Subject, find_subject
from rlhf.metrics import read_jsonl
from rlhf.option_parser import check_options

REPORT, PICTURE = "diagnosis.json", "diagnosis.png"


def diagnose(options: DiagnoseOptions) -> dict:
    """Diagnose a run, print the tables, and write them; return the content of `diagnosis.json`.

    Raises:
        InputError: a bad option, or models, scorers or rows that cannot be used.
    """
    check_options(options)
    subject = find_subject(options)
    folder = options.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={folder} cannot be made: {error.strerror}") from error
    quiet_libraries()
    from rlhf.diagnose.answers import measure
    from rlhf.diagnose.remedies import commands, verdict
    from rlhf.diagnose.show import show
    from rlhf.diagnose.weakest_link import findings_of

    found = findings_of(measure(options, subject), subject)
    found |= {"verdict": verdict(found), "commands": commands(found, subject)}
    write_whole(folder / REPORT, json.dumps(found, indent=2) + "\n")
    show(found)
    picture = _draw(found, subject, folder)
    say(f"\nsaved {folder}/: {REPORT}{picture}")
    return found


def _draw(found: dict, subject: Subject, folder: Path) -> str:
    from rlhf.diagnose.show import draw

    if plot_hint(PICTURE):
        return ""
    final = subject.finals.get("ppo")
    rows = read_jsonl(final.parent / "metrics.jsonl") if final else []
    draw(found, rows).savefig(folder / PICTURE)
    return f", {PICTURE}"
