"""The web page of a chat: a small ASGI app on Starlette, plain files in `page/`.

The conversation is kept by the browser; a request has all of it. Who may ask is decided by
`rlhf.web.guard`, and no HTML of a model reaches the page (`rlhf.web.render`).

    POST /api/about   {}                                      -> the models, and the rankings so far
    POST /api/ask     {question, before, models, number}      -> server-sent events: answers as they
                                                                 come, of several models in turn
    POST /api/render  {texts}                                 -> the texts as safe HTML
    POST /api/mark    {id, question, before, answers, marks}  -> keeps a ranking, or takes it out

`before` has the rounds before the question, as [question, answer]. Left out: several answers at
once to several browsers; the second one waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.chat.conversation import Chat
from rlhf.chat.rankings import Rankings, ranked_row
from rlhf.data import whole_characters
from rlhf.web.guard import Guard, files, read_body, text_of
from rlhf.web.render import both
from rlhf.web.server import Refused

PAGE = Path(__file__).with_name("page")
MOST_ANSWERS = 9  # to a question: keys 1 to 9


def make_app(
    chats: Sequence[Chat], rankings: Rankings, host: str = "127.0.0.1", token: str | None = None
) -> Any:
    """Make the ASGI app; `host` and `token` are those of `Guard`."""
    room = Room(chats, rankings)
    routes = [Route("/api/{name}", room.answer, methods=["POST"]), files(PAGE)]
    return Guard(Starlette(routes=routes), "chat", host, token)


class Room:
    """What the page asks for."""

    def __init__(self, chats: Sequence[Chat], rankings: Rankings):
        self.chats, self.rankings = chats, rankings
        self.lock = asyncio.Lock()  # one answer, or one of each model, at a time

    async def answer(self, request: Request) -> Response:
        """Answer one request of the page; an error is {"error": text}."""
        asked = {"about": self._about, "render": self._render, "mark": self._mark}
        name = request.path_params["name"]
        try:
            body = await read_body(request)
            if name == "ask":
                events = self.events(*self._question(body))
                return StreamingResponse(events, media_type="text/event-stream")
            if name not in asked:
                return JSONResponse({"error": "The page is older than the server: reload it."}, 404)
            return JSONResponse(asked[name](body))
        except Refused as error:
            return JSONResponse({"error": str(error)}, 409)
        except OSError as error:
            return JSONResponse({"error": f"The server cannot save it ({error})."}, 503)

    def _about(self, body: dict[str, Any]) -> dict[str, Any]:
        models = [
            {"name": chat.path, "about": chat.why_text or "", "varies": bool(chat.temperature)}
            for chat in self.chats
        ]
        return {"models": models, "out": str(self.rankings.out), "rows": len(self.rankings.rows)}

    def _render(self, body: dict[str, Any]) -> dict[str, Any]:
        texts = body.get("texts")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused("The texts are not a list of texts.")
        return {"texts": [both(whole_characters(text)) for text in texts]}

    # --- Answers ----------------------------------------------------------------------------------

    def _question(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], list[int], int]:
        """Question, rounds before it, numbers of the models, and number of the answer."""
        question, number = text_of(body, "question").strip(), body.get("number")
        if not question:
            raise Refused("Write a question first.")
        models = body.get("models")
        if not isinstance(models, list) or not models or len(set(map(str, models))) < len(models):
            raise Refused("Name each model once.")
        if not all(type(i) is int and 0 <= i < len(self.chats) for i in models):
            raise Refused("There is no such model: reload the page.")
        if type(number) is not int or not 0 <= number < 2**63:
            raise Refused("The number of the answer must be a whole number.")
        return question, _rounds(body), models, number

    async def events(
        self, question: str, before: list[tuple[str, str]], models: list[int], number: int
    ) -> AsyncIterator[str]:
        """Let the models answer in turn, piece by piece; closing this stops them."""
        if self.lock.locked():
            yield _event({"note": "Another answer is being written; yours comes next."})
        async with self.lock:
            notes: list[str] = []
            running = {}
            for i in models:
                chat = self.chats[i]
                chat.reset()
                chat.rounds, chat.cut_off, chat.note = list(before), False, notes.append
                running[i] = chat.ask(question, number)
            try:
                while running:
                    for i, pieces in list(running.items()):
                        piece = await run_in_threadpool(next, pieces, None)
                        for text in notes:
                            yield _event({"model": i, "note": text.strip("[]")})
                        notes.clear()
                        if piece is None:
                            del running[i]
                            yield _event({"model": i, "done": True, "cut": self.chats[i].cut_off})
                        elif piece:
                            yield _event({"model": i, "text": piece})
            except RuntimeError as error:  # no memory left, for example
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                yield _event({"error": f"The answer broke off: {reason}"})
            finally:
                for pieces in running.values():
                    pieces.close()  # type: ignore[attr-defined]

    # --- Rankings ---------------------------------------------------------------------------------

    def _mark(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep what a person said about the answers to a question."""
        name, question = text_of(body, "id"), text_of(body, "question").strip()
        answers, marks = body.get("answers"), body.get("marks")
        if not name or not question or not isinstance(answers, list) or not isinstance(marks, list):
            raise Refused("The ranking lacks its question, its answers or its marks.")
        if len(answers) != len(marks) or len(answers) > MOST_ANSWERS:
            raise Refused(f"A ranking has a mark for each answer, at most {MOST_ANSWERS}.")
        if not all(type(mark) is int and abs(mark) <= 1 for mark in marks):
            raise Refused("A mark is 1, 0 or -1.")
        found = []
        for one in answers:
            i = one.get("model") if isinstance(one, dict) else None
            if type(i) is not int or not 0 <= i < len(self.chats):
                raise Refused("There is no such model: reload the page.")
            found.append((self.chats[i].path, text_of(one, "text").strip()))
        row = ranked_row(name, self._prompt(question, _rounds(body)), found, marks)
        self.rankings.put(name, row)
        return {"rows": len(self.rankings.rows), "kept": row is not None}

    def _prompt(self, question: str, before: list[tuple[str, str]]) -> Any:
        """The prompt of a row: text where every model continues text, else a conversation."""
        if all(chat.why_text for chat in self.chats):
            return question
        turns = [
            {"role": role, "content": text}
            for asked, answered in before
            for role, text in (("user", asked), ("assistant", answered))
        ]
        chat = next(chat for chat in self.chats if not chat.why_text)
        return chat.options.with_system([*turns, {"role": "user", "content": question}])


def _rounds(body: dict[str, Any]) -> list[tuple[str, str]]:
    rounds = body.get("before")
    if not isinstance(rounds, list):
        raise Refused("The conversation is not a list of rounds.")
    for one in rounds:
        if not isinstance(one, list) or [type(text) for text in one] != [str, str]:
            raise Refused("A round is not a question and an answer.")
    return [(whole_characters(asked), whole_characters(answered)) for asked, answered in rounds]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
