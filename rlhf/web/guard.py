"""Who may ask a page of ours, and how requests are read: for every page that a command serves.

Every request must name a host of this machine, and every change must come from the page itself: so
no other web site can read or act through a visitor's browser. With a token, only browsers that were
opened with it are let in. Left out: accounts with passwords, TLS (an SSH tunnel has it).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import secrets
import socket
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf.data import whole_characters
from rlhf.web.server import Refused

LARGEST_BODY = 2_000_000  # bytes
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
SHARED = Path(__file__).with_name("page")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def files(page: Path) -> Route:
    """Serve the files of a folder and those that all pages share; `/` is index.html."""
    known = {file.name: file for folder in (SHARED, page) for file in folder.iterdir()}

    async def answer(request: Request) -> Response:
        file = known.get(request.path_params["name"] or "index.html")
        if file is None:
            return PlainTextResponse("There is no such page.", 404)
        return Response(file.read_bytes(), media_type=KINDS[file.suffix])

    return Route("/{name:path}", answer, methods=["GET"])


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused("The request is not JSON.")
    data = b""
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > LARGEST_BODY:
                raise Refused(f"The text is too long: at most {LARGEST_BODY:,} bytes are taken.")
    except ClientDisconnect as error:
        raise Refused("The request was cut off.") from error
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("The request is not JSON.") from error
    if not isinstance(body, dict):
        raise Refused("The request is not a JSON object.")
    return body


def text_of(body: dict[str, Any], name: str) -> str:
    """A text of a request; "" where there is none."""
    value = body.get(name)
    return whole_characters(value) if isinstance(value, str) else ""


class Guard:
    """Lets requests pass that come from the page, on a name of this machine, with the token."""

    def __init__(self, app: Any, name: str, host: str, token: str | None):
        """Guard an app.

        Args:
            name: of the command, so that two of them on one machine have a cookie each.
            host: address that it is served on; its name is allowed in requests.
            token: secret that lets a browser in; None lets every browser of this machine in.
        """
        self.app, self.token, self.name = app, token, f"rlhf_{name}"
        self.cookie = hashlib.sha256(f"{self.name} {token}".encode()).hexdigest()
        self.hosts = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        has_begun = False

        async def with_headers(message: Any) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        answer = self._refusal(scope) or self._admission(scope) or self.app
        try:
            await answer(scope, receive, with_headers)
        except asyncio.CancelledError:  # the server ends, and a request is half sent
            if not has_begun:
                ended = JSONResponse({"error": "The server has ended."}, 503)
                await ended(scope, receive, with_headers)

    def _refusal(self, scope: Any) -> Response | None:
        """Refuse names of other hosts (DNS rebinding) and changes that other sites ask for."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return PlainTextResponse(f"This page is not served as {host!r}.", 421)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return PlainTextResponse("Requests of other web sites are refused.", 403)
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            if scope["method"] != "GET" or scope["path"] != "/":  # a link to the page is fine
                return PlainTextResponse("Requests of other web sites are refused.", 403)
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        # no other site has an address for its name; without a token only loopback is served
        return address.is_loopback or self.token is not None

    def _admission(self, scope: Any) -> Response | None:
        """With the token in the address, set a cookie; without both, ask for the token."""
        if self.token is None:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if _equal(given, self.token):
            answer = RedirectResponse("/", 303)
            # not "strict": a browser that follows a link in a mail would not send it
            answer.set_cookie(self.name, self.cookie, httponly=True, samesite="lax")
            return answer
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        if self.name in cookies and _equal(cookies[self.name].value, self.cookie):
            return None
        return PlainTextResponse("Open the page with ?token=<the token of the server>.", 401)


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
