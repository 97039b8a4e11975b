"""People rank answers in a web page on this machine.

    python -m rlhf.rank prompts=prompts.jsonl path=runs/mine/sft/final samples_per_prompt=4
    python -m rlhf.rank prompts=prompts.jsonl path=[runs/a/sft/final,runs/b/sft/final] overlap=3
    python -m rlhf.rank prompts=answers.jsonl out=rankings.jsonl
    python -m rlhf.rank prompts=answers.jsonl overlap=2 scorer=judge:helpfulness model=Qwen/Qwen3-8B url=http://127.0.0.1:8000/v1

The third one needs no model: its rows have `responses`. The page shows a prompt with its answers in
random order, without the names of models. It writes

    <name>.rankings.jsonl                 for python -m rlhf.reward dataset=ranked
    <name>.rankings.demonstrations.jsonl  answers that people wrote, for python -m rlhf.sft
    <name>.rankings.conversations.jsonl   conversations that people wrote, for python -m rlhf.sft
    <name>.rankings.report.json           counts, agreement, and which policy wins
    <name>.rankings.sqlite                everything; a kill at any moment loses no submission

In the last one a judge ranks every prompt, and a person too; the report says how far they agree.
Without overlap=2 the judge ranks all, and no page is served. The same command continues. Left out: a
chat with a model, which is `python -m rlhf.chat`.
"""  # noqa: E501

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from rlhf.config import InputError
from rlhf.console import say
from rlhf.option_parser import check_options, run_command
from rlhf.rank.by_scorer import check_ranking_scorer, rank_by_scorer
from rlhf.rank.options import RankOptions
from rlhf.rank.ranked_rows import export, written_files
from rlhf.rank.serving import serve
from rlhf.rank.store import OTHER, Store
from rlhf.rank.summary import make_report, report_text, save_report
from rlhf.rank.tasks import check_models, make_tasks, read_questions
from rlhf.sqlite_files import database_errors
from rlhf.web.server import bound, check_server


def run(options: RankOptions) -> None:
    """Sample answers, serve the page until Ctrl-C, and show what people said.

    Raises:
        InputError: a value is not allowed, the port or the store is in use, the output is not ours,
            or the prompts cannot be read.
    """
    from rlhf.checkpoint import disk_errors, locked

    check_options(options)
    check_models(options)
    check_ranking_scorer(options)
    source = Path(options.prompts).expanduser()
    out = Path(options.out or source.with_suffix(".rankings.jsonl"))
    if out.suffix != ".jsonl":
        raise InputError(f"out={out} is the file of the rankings; give out={out.stem}.jsonl")
    store_file = out.with_suffix(".sqlite")
    with ExitStack() as stack:
        socket = None
        if options.serve:
            check_server(options.host, options.token)
            socket = stack.enter_context(bound(options.host, options.port))
            questions, digest = read_questions(options)
        stack.enter_context(disk_errors(out.parent, "give the same command again"))
        lock = out.with_name(f".{out.name}.lock")
        stack.enter_context(locked(lock, f"out={out}", "use its page, or another out=<file>"))
        stack.enter_context(database_errors(store_file, OTHER))
        store = stack.enter_context(closing(_open(options, out, store_file)))

        def write() -> None:
            export(store, out)

        if socket is not None:
            make_tasks(options, store, questions, digest)
            if options.scorer is not None:
                rank_by_scorer(options, store)
            if options.scorer is None or not store.is_complete():
                serve(store, socket, options.host, options.token, options.annotators, write)
        write()
        _conclude(store, out)


def _open(options: RankOptions, out: Path, file: Path) -> Store:
    """Open the store, whose files may be written again; files of others may not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for taken in (out, *written_files(out)):
        if not file.exists() and os.path.lexists(taken):
            raise InputError(f"{taken} exists already; delete it, or give another out=<file>")
    if not options.serve and not file.exists():
        raise InputError(f"{file} does not exist: nothing was ranked yet; leave serve=false out")
    return Store(file, options.overlap, options.seed)


def _conclude(store: Store, out: Path) -> None:
    judgements = store.judgements()
    without = sum((store.fact("without") or {}).values())
    report = make_report(judgements, len(store.tasks()), without, len(store.conversations()))
    file = out.with_name(f"{out.stem}.report.json")
    save_report(report, file)
    say(report_text(report))
    written = [one for one in written_files(out) if one.exists()]
    say(f"saved {', '.join(map(str, [out, *written, file]))}")
    if report["num_rankings"]:
        say(f"next: python -m rlhf.reward dataset=ranked dataset.path={out} model.path=<model>")


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), RankOptions, run, sys.argv[1:]))
