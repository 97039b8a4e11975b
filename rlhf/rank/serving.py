"""Serving a store until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from rlhf.console import say
from rlhf.rank.store import Store
from rlhf.web import server


def serve(
    store: Store,
    taken: socket.socket,
    host: str,
    token: str | None = None,
    annotators: Sequence[str] | None = None,
    export: Callable[[], None] = lambda: None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        taken: the bound socket, see `rlhf.web.server.bound`.
        host, token, annotators, export: as in `make_app`.
    """
    from rlhf.rank.app import make_app

    address = server.address_of(taken, host, token)
    say(f"rank at {address} (Ctrl-C ends; the same command continues)")
    server.serve(make_app(store, export, host, token, annotators), taken)
