"""Talking in the terminal: lines that are typed or piped in, and answers as they come."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from rlhf.chat.conversation import INCOMPLETE, Chat, ChatOptions, note
from rlhf.config import nearest
from rlhf.option_parser import check_options
from rlhf.policy import check_policies

COMMANDS = ("/reset", "/undo", "/exit")


def talk(options: ChatOptions) -> None:
    """Answer the lines that are typed or piped in, until they end."""
    check_options(options)
    check_policies(options, options.models)
    chats = [Chat(options, path, field) for field, path in options.models.items()]
    for chat in chats:
        note(chat.describe())
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 become U+FFFD
    if interactive:
        with suppress(ImportError):  # not on every system; for editing and history of the line
            import readline  # noqa: F401
        note(f"{' '.join(COMMANDS)}; Ctrl-C stops an answer, Ctrl-D leaves")
    for number, line in enumerate(_lines(interactive)):
        command = line.strip()
        if command == "/exit":
            return
        if command in ("/undo", "/reset"):
            for chat in chats:
                chat.undo() if command == "/undo" else chat.reset()
            note(f"[{min(len(chat.rounds) for chat in chats)} rounds remembered]")
        elif re.fullmatch(r"/\w+", command):
            note(f"[unknown command {command}.{nearest(command, COMMANDS)}]")
        elif command:
            for chat in chats:
                if not interactive and not options.one_conversation:
                    chat.reset()
                if len(chats) > 1:
                    print(f"--- {chat.path}", flush=True)
                _answer(chat, line if chat.why_text else command, number, interactive)


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                note("")  # so that the shell's prompt begins a line
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n[Ctrl-D or /exit leaves]")


def _answer(chat: Chat, question: str, number: int, interactive: bool) -> None:
    with closing(chat.ask(question, number)) as pieces:  # type: ignore[type-var]
        try:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
            note(" [stopped]")
            return
    print(flush=True)
    if chat.cut_off:
        note(
            f"[cut off: response_length={chat.sampling.max_new_tokens}, or the end of the context]"
        )


def printable(text: str) -> str:
    """Replace control characters: with them a model could control the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", INCOMPLETE, text)
