"""The web page in which people rank answers: a small ASGI app on Starlette, plain files in `page/`.

Names of models never reach the browser, and no HTML of a model does (`render`). Every request must
name a host of this machine, and every change must come from the page itself: so no other web site
can read or judge through a visitor's browser. With a token, only browsers that were opened with it
are let in.

    POST /api/next    {annotator, skipped}           -> the task that is shown, or done
    POST /api/submit  {annotator, token, kind, ...}  -> takes a judgement
    POST /api/undo    {annotator}                    -> takes the last one back
    POST /api/report  {annotator}                    -> agreement so far
    POST /api/write   {annotator, token, messages}   -> takes a conversation that a person wrote

Left out: accounts with passwords, TLS (an SSH tunnel has it).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import secrets
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf.data import whole_characters
from rlhf.rank.render import to_html, visible
from rlhf.rank.store import Refused, Showing, Store
from rlhf.rank.summary import live_report

PAGE = Path(__file__).with_name("page")
FILES = {"": ("index.html", "text/html"), "rank.css": ("rank.css", "text/css")}
FILES |= {name: (name, "text/javascript") for name in ("rank.js", "drag.js", "write.js")}
COOKIE = "rlhf_rank"
LARGEST_BODY = 2_000_000  # bytes
LONGEST_NAME = 60  # characters
EXPORT_SECONDS = 1.0
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


def make_app(
    store: Store,
    export: Callable[[], None] = lambda: None,
    host: str = "127.0.0.1",
    token: str | None = None,
    annotators: Sequence[str] | None = None,
) -> Any:
    """Make the ASGI app.

    Args:
        export: writes files of the judgements; it is called when the app starts, within a second of
            a change, and when the app ends.
        host: address that it is served on; its name is allowed in requests.
        token: secret that lets a browser in; None lets every browser of this machine in.
        annotators: names that may rank; None allows any name.
    """
    desk = Desk(store, annotators)

    @asynccontextmanager
    async def exporting(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(_export_changes(store, export))
        yield
        task.cancel()
        await run_in_threadpool(export)

    routes = [
        Route("/api/{name}", desk.answer, methods=["POST"]),
        Route("/{name:path}", _file, methods=["GET"]),
    ]
    return Guard(Starlette(routes=routes, lifespan=exporting), host, token)


async def _export_changes(store: Store, export: Callable[[], None]) -> None:
    exported = -1
    while True:
        if (changes := store.changes()) != exported:
            with suppress(
                OSError
            ):  # a full disk: the store has it, and the next change tries again
                await run_in_threadpool(export)
                exported = changes
        await asyncio.sleep(EXPORT_SECONDS)


async def _file(request: Request) -> Response:
    name, kind = FILES.get(request.path_params["name"], ("", ""))
    if not name:
        return PlainTextResponse("There is no such page.", 404)
    return Response((PAGE / name).read_bytes(), media_type=kind)


class Desk:
    """What the page asks for."""

    def __init__(self, store: Store, annotators: Sequence[str] | None) -> None:
        self.store, self.annotators = store, annotators
        self._report: tuple[int, dict[str, Any]] = (-1, {})
        self.asked: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
            **{"next": self._next, "submit": self._submit},
            **{"undo": self._undo, "report": self._live, "write": self._write},
        }

    async def answer(self, request: Request) -> Response:
        """Answer one request of the page, in JSON; an error is {"error": text}."""
        try:
            body = await _body(request)
            asked = self.asked.get(request.path_params["name"])
            if asked is None:
                return JSONResponse({"error": "The page is older than the server: reload it."}, 404)
            return JSONResponse(await run_in_threadpool(asked, self._annotator(body), body))
        except Refused as error:
            return JSONResponse({"error": str(error)}, 409)
        except (sqlite3.Error, OSError) as error:
            what = f"The server cannot save it ({error}). Your work is kept in this browser."
            return JSONResponse({"error": what}, 503)

    def _annotator(self, body: dict[str, Any]) -> str:
        name = " ".join(visible(_text(body, "annotator")).split())
        if not name or len(name) > LONGEST_NAME:
            raise Refused(f"Give a name of at most {LONGEST_NAME} characters.")
        if self.annotators is not None and name not in self.annotators:
            raise Refused(f"{name} is not one of the annotators of this page.")
        return name

    def _next(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("skipped") is True:
            self.store.reopen_skipped(annotator)
        showing = self.store.next(annotator)
        progress = self.store.progress(annotator)
        return {"progress": progress, "task": None if showing is None else _shown(showing)}

    def _submit(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        ranks = body.get("ranks") or []
        if not isinstance(ranks, list) or not all(type(r) is int and abs(r) < 1000 for r in ranks):
            raise Refused("The ranks must be whole numbers, one for each answer.")
        text = _text(body, "demonstration").strip() or None
        token, kind = _text(body, "token"), _text(body, "kind")
        self.store.submit(token, annotator, kind, ranks, _text(body, "reason").strip(), text)
        return self._next(annotator, {})

    def _undo(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self.store.undo(annotator):
            raise Refused("There is nothing to undo.")
        return self._next(annotator, {})

    def _write(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        turns = body.get("messages")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Refused("The conversation is not a list of turns.")
        messages = [{name: _text(turn, name) for name in ("role", "content")} for turn in turns]
        self.store.save_conversation(_text(body, "token"), annotator, messages)
        return {}

    def _live(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        changes = self.store.changes()
        if self._report[0] != changes:
            self._report = (changes, live_report(self.store.judgements()))
        return self._report[1]


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused("The request is not JSON.")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST_BODY:
            raise Refused(f"The text is too long: at most {LARGEST_BODY:,} bytes are taken.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("The request is not JSON.") from error
    if not isinstance(body, dict):
        raise Refused("The request is not a JSON object.")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    return whole_characters(value) if isinstance(value, str) else ""


def _shown(showing: Showing) -> dict[str, Any]:
    """A task for the page: rendered, in the order of its cards, without the names of models."""
    prompt = showing.task.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [showing.task.responses[card[0]] for card in showing.cards]
    return {
        "token": showing.token,
        "number": showing.task.number + 1,
        "prompt": [{"role": turn["role"], **_both(turn["content"])} for turn in turns],
        "cards": [_both(text) for text in texts],
        "before": showing.before,
    }


def _both(text: str) -> dict[str, str]:
    return {"html": to_html(text), "text": text, "plain": visible(text)}


class Guard:
    """Lets requests pass that come from the page, on a name of this machine, with the token."""

    def __init__(self, app: Any, host: str, token: str | None):
        self.app, self.token = app, token
        self.cookie = hashlib.sha256(f"rlhf.rank {token}".encode()).hexdigest()
        self.hosts = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        answer = self._refusal(scope) or self._admission(scope) or self.app
        await answer(scope, receive, with_headers)

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
            answer.set_cookie(COOKIE, self.cookie, httponly=True, samesite="lax")
            return answer
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        if COOKIE in cookies and _equal(cookies[COOKIE].value, self.cookie):
            return None
        return PlainTextResponse("Open the page with ?token=<the token of the server>.", 401)


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
