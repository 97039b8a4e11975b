"""A port of this machine that nobody else gets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port on which nobody listens, and which the system gives to nobody else inside the block.

    A server that names it, and lets its address be used again, as those of torch, asyncio and
    `http.server` do, can listen there.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
