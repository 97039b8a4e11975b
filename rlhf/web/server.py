"""Serving a page on an address of this machine, until Ctrl-C. Who may ask is decided by `guard`.

This file needs no library of the extra `web` before `serve`.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from rlhf.config import InputError, knob

LIBRARIES = ("starlette", "uvicorn", "markdown_it")
SHORTEST_TOKEN = 8


class Refused(Exception):
    """What a browser asked for cannot be done; the message is for the person who sees the page."""


@dataclass(kw_only=True)
class ServerOptions:
    """Options of every command that serves a page."""

    host: str = "127.0.0.1"
    """Address of the page; one that other machines reach needs token=."""
    port: int = knob(8765, ge=0, le=65535)
    """Port of the page; 0 takes a free one."""
    token: str | None = None
    """Secret that a browser must be opened with, at least 8 characters."""


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


def serve(app: Any, taken: socket.socket) -> None:
    """Serve an ASGI app on a bound socket until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        server_of(app).run(sockets=[taken])


def server_of(app: Any) -> Any:
    """The server of an ASGI app; requests have 3 seconds to end after Ctrl-C."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, ws="none"
    )
    return uvicorn.Server(config)


def address_of(taken: socket.socket, host: str, token: str | None) -> str:
    """What a person opens."""
    address: Any = taken.getsockname()
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{address[1]}/" + (f"?token={quote(token)}" if token else "")
