"""The web page in which people rank answers: a small ASGI app on Starlette, plain files in `page/`.

Names of models never reach the browser, and no HTML of a model does (`rlhf.web.render`). Who may
ask is decided by `rlhf.web.guard`.

    POST /api/next    {annotator, skipped}           -> the task that is shown, or done
    POST /api/submit  {annotator, token, kind, ...}  -> takes a judgement
    POST /api/undo    {annotator}                    -> takes the last one back
    POST /api/report  {annotator}                    -> agreement so far
    POST /api/write   {annotator, token, messages}   -> takes a conversation that a person wrote

Left out: accounts with passwords.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf.console import warn
from rlhf.rank.store import Showing, Store
from rlhf.rank.summary import live_report
from rlhf.web.guard import Guard, files, read_body, text_of
from rlhf.web.render import both, visible
from rlhf.web.server import Refused

PAGE = Path(__file__).with_name("page")
LONGEST_NAME = 60  # characters
EXPORT_SECONDS = 1.0
FAILURES = (OSError, sqlite3.Error)  # of a disk, which may be over in a moment


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
        host, token: as in `Guard`.
        annotators: names that may rank; None allows any name.
    """
    desk = Desk(store, annotators)

    @asynccontextmanager
    async def exporting(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(_export_changes(store, export))
        yield
        task.cancel()
        with suppress(*FAILURES):  # the command exports once more, and says why it cannot
            await run_in_threadpool(export)

    routes = [Route("/api/{name}", desk.answer, methods=["POST"]), files(PAGE)]
    return Guard(Starlette(routes=routes, lifespan=exporting), "rank", host, token)


async def _export_changes(store: Store, export: Callable[[], None]) -> None:
    exported, said = -1, ""
    while True:
        failure = ""
        try:
            if (changes := store.changes()) != exported:
                await run_in_threadpool(export)
                exported = changes
        except FAILURES as error:
            failure = str(error)
            if failure != said:
                warn(f"nothing is exported ({failure}), but all is in {store.file}; trying again")
        said = failure
        await asyncio.sleep(EXPORT_SECONDS)


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
            body = await read_body(request)
            asked = self.asked.get(request.path_params["name"])
            if asked is None:
                return JSONResponse({"error": "The page is older than the server: reload it."}, 404)
            return JSONResponse(await run_in_threadpool(asked, self._annotator(body), body))
        except Refused as error:
            return JSONResponse({"error": str(error)}, 409)
        except FAILURES as error:
            what = f"The server cannot save it ({error}). Your work is kept in this browser."
            return JSONResponse({"error": what}, 503)

    def _annotator(self, body: dict[str, Any]) -> str:
        name = " ".join(visible(text_of(body, "annotator")).split())
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
        text = text_of(body, "demonstration").strip() or None
        token, kind = text_of(body, "token"), text_of(body, "kind")
        self.store.submit(token, annotator, kind, ranks, text_of(body, "reason").strip(), text)
        return self._next(annotator, {})

    def _undo(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self.store.undo(annotator):
            raise Refused("There is nothing to undo.")
        return self._next(annotator, {})

    def _write(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        turns = body.get("messages")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Refused("The conversation is not a list of turns.")
        messages = [{name: text_of(turn, name) for name in ("role", "content")} for turn in turns]
        self.store.save_conversation(text_of(body, "token"), annotator, messages)
        return {}

    def _live(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        changes = self.store.changes()
        if self._report[0] != changes:
            self._report = (changes, live_report(self.store.judgements()))
        return self._report[1]


def _shown(showing: Showing) -> dict[str, Any]:
    """A task for the page: rendered, in the order of its cards, without the names of models."""
    prompt = showing.task.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [showing.task.responses[card[0]] for card in showing.cards]
    return {
        "token": showing.token,
        "number": showing.task.number + 1,
        "prompt": [{"role": turn["role"], **both(turn["content"])} for turn in turns],
        "cards": [both(text) for text in texts],
        "before": showing.before,
    }
