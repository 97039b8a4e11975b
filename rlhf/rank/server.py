"""Serving a store on an address of this machine, until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from rlhf.config import InputError
from rlhf.console import say
from rlhf.rank.store import Store

LIBRARIES = ("starlette", "uvicorn", "markdown_it")
SHORTEST_TOKEN = 8


def check_server(host: str, token: str | None) -> None:
    """Refuse an open door, and missing libraries, before anything is sampled."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(f"the page needs {', '.join(missing)}; pip install 'rlhf[web]'")
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise InputError(f"token must have at least {SHORTEST_TOKEN} characters, got {len(token)}")
    if token is None and not _is_loopback(host):
        raise InputError(
            f"host={host} lets other machines in; add token=<a secret of {SHORTEST_TOKEN} or more "
            "characters>, or leave host out and open an SSH tunnel"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Take the address, so that a port in use is refused before anything is sampled."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InputError(f"host={host} is not an address ({error})") from error
    with socket.socket(family, kind, protocol) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(address)
            taken.listen()
        except OSError as error:
            fix = "give another host="
            if error.errno == errno.EADDRINUSE:
                fix = f"another program uses it; give port={port + 1}, or port=0 for a free one"
            elif error.errno == errno.EACCES:
                fix = "ports below 1024 are the system's; give port=8765"
            reason = f"cannot be opened: {error.strerror}"
            raise InputError(f"port={port} of {host} {reason}; {fix}") from error
        yield taken


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
        taken: the bound socket.
        host, token, annotators, export: as in `make_app`.
    """
    import uvicorn

    from rlhf.rank.app import make_app

    app = make_app(store, export, host, token, annotators)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, ws="none"
    )
    say(f"rank at {address_of(taken, host, token)} (Ctrl-C ends; the same command continues)")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[taken])


def address_of(taken: socket.socket, host: str, token: str | None) -> str:
    """What a person opens."""
    address: Any = taken.getsockname()
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{address[1]}/" + (f"?token={quote(token)}" if token else "")
