"""Serving the page of a chat until Ctrl-C."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rlhf.chat.conversation import Chat, ChatOptions
from rlhf.chat.rankings import Rankings
from rlhf.config import InputError
from rlhf.console import say
from rlhf.option_parser import check_options
from rlhf.policy import check_policies
from rlhf.web.server import address_of, bound, check_server, serve


def serve_page(options: ChatOptions) -> None:
    """Load the models, and serve the page."""
    from rlhf.checkpoint import disk_errors, locked

    check_options(options)
    check_server(options.host, options.token)
    out = Path(options.out).expanduser()
    if out.suffix != ".jsonl":
        raise InputError(f"out={out} is the file of the rankings; give out={out.stem}.jsonl")
    check_policies(options, options.models)
    with ExitStack() as stack:
        socket = stack.enter_context(bound(options.host, options.port))
        stack.enter_context(disk_errors(out.parent, "give the same command again"))
        out.parent.mkdir(parents=True, exist_ok=True)
        lock, fix = out.with_name(f".{out.name}.lock"), "use its page, or another out=<file>"
        stack.enter_context(locked(lock, f"out={out}", fix))
        rankings = Rankings(out)
        if rankings.rows:
            say(f"{out} has {len(rankings.rows):,} rankings; new ones are added")
        chats = [Chat(options, path, field) for field, path in options.models.items()]
        for chat in chats:
            say(chat.describe())
        from rlhf.chat.web import make_app

        say(f"chat at {address_of(socket, options.host, options.token)} (Ctrl-C ends)")
        serve(make_app(chats, rankings, options.host, options.token), socket)
    if rankings.rows:
        say(f"{len(rankings.rows):,} rankings in {out}")
        say(f"next: python -m rlhf.reward dataset=ranked dataset.path={out} model.path=<model>")
