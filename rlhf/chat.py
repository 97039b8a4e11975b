"""Talk to a policy in the terminal: python -m rlhf.chat path=runs/demo/sft/final

Answers are sampled by the same loop as in PPO, and printed as they come. When the context is full,
the oldest rounds are left out. Questions can be piped in, one per line: answers go to stdout,
remarks to stderr. Each line is a conversation of its own, unless one_conversation=true.

/reset forgets the conversation, /undo forgets its last round, /exit or Ctrl-D leaves. Ctrl-C stops
an answer; the part that was printed stays in the conversation.

A model continues each line as text if it has no chat template or was trained on text prompts.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

from rlhf.config import nearest
from rlhf.data import whole_characters
from rlhf.options import check_options, run_command
from rlhf.policy import Policy, PolicyOptions, check_policies

COMMANDS = ("/reset", "/undo", "/exit")
INCOMPLETE = "\ufffd"  # a decoder's sign for bytes that do not (or not yet) form a character


@dataclass
class ChatOptions(PolicyOptions):
    """The command line."""

    compare: str | None = None
    """A second model; it answers every question too and has a history of its own."""
    one_conversation: bool = False
    """true: the lines that are piped in are one conversation."""


def note(text: str) -> None:
    """Print a remark on stderr: stdout has the answers alone."""
    print(text, file=sys.stderr, flush=True)


# --- One model and its conversation -------------------------------------------------------------


class Chat(Policy):
    """A model, and its side of the conversation.

    Attributes:
        rounds: (question, answer) pairs, oldest first; empty if lines are continued as text.
        cut_off: True if the last answer used up its budget.
    """

    def __init__(self, options: ChatOptions, field: str = "path"):
        """Load the model that `field` of the options names."""
        super().__init__(options, str(getattr(options, field)), field)
        self.rounds: list[tuple[str, str]] = []
        self.cut_off = False
        self._said_full = False

    def ask(self, question: str, number: int) -> Iterator[str]:
        """Sample an answer, yield its text as it comes, and remember the round.

        If the generator is closed or Ctrl-C is pressed, the round keeps the text so far. `number`
        and the seed select the random numbers.
        """
        from rlhf.sampling import stream, uniform_noise

        question = whole_characters(question)
        prompt_ids, room = self.prompt(question)
        if room < 1:
            note(
                f"[not answered: the question has {len(prompt_ids)} tokens, but the model's "
                f"context has {len(prompt_ids) + room}]"
            )
            return
        budget = min(self.sampling.max_new_tokens, room)
        sampling = dataclasses.replace(self.sampling, max_new_tokens=budget)
        seed = (self.options.seed, number)
        noise = uniform_noise(seed, [0], budget) if self.temperature else None
        ids: list[int] = []
        num_shown, self.cut_off = 0, False
        try:
            for token in stream(self.model, prompt_ids, sampling, noise):
                ids.append(token)
                text = self._settled_text(ids)
                if len(text) > num_shown:
                    yield text[num_shown:]
                    num_shown = len(text)
            yield self.text(ids)[num_shown:]
            stops = sampling.stop_strings
            self.cut_off = ids[-1] not in sampling.stop_ids and not (stops and stops.end(ids))
        finally:
            if not self.why_text:
                self.rounds.append((question, self.text(ids)))

    def _settled_text(self, ids: list[int]) -> str:
        """The text that no later token can change.

        Held back are an incomplete character, the chat template's text around an answer, and the
        beginning of a stop string with the whitespace before it.
        """
        from rlhf.tokenizer import Frame, answer_frame

        text = self.text(ids).rstrip(INCOMPLETE)
        frame = Frame() if self.why_text else answer_frame(self.tokenizer)
        if frame.lead.startswith(text):
            return ""
        stops = self.sampling.stop_strings
        ends = [frame.tail, *(stops.strings if stops else ())]
        starts = (end[:n] for end in ends for n in range(1, len(end)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        text = text[: len(text) - held]
        return text.rstrip() if stops else text

    def prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids up to the answer, and the tokens left for the answer (negative if too few).

        The oldest rounds are dropped until the longest answer fits, or half the context is free.
        """
        from rlhf.sampling import context_length

        context = context_length(self.model)
        reserve = min(self.sampling.max_new_tokens, context // 2)
        kept = self.rounds
        ids = self.encode(question, kept)
        while kept and len(ids) + reserve > context:
            kept = kept[1:]
            ids = self.encode(question, kept)
        if len(ids) < context:
            if len(kept) < len(self.rounds) and not self._said_full:
                note(f"[the context of {context} tokens is full: the oldest rounds are left out]")
                self._said_full = True
            self.rounds = kept
        return ids, context - len(ids)

    def encode(self, question: str, rounds: list[tuple[str, str]]) -> list[int]:
        """Token ids of a question after earlier rounds, up to the answer."""
        turns = [
            turn
            for asked, answered in rounds
            for turn in (("user", asked), ("assistant", answered))
        ]
        said = [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]
        return self.encode_prompt(question if self.why_text else said)

    def undo(self) -> None:
        """Forget the last round."""
        self.rounds = self.rounds[:-1]

    def reset(self) -> None:
        """Forget the conversation."""
        self.rounds, self._said_full = [], False


# --- The terminal -------------------------------------------------------------------------------


def talk(options: ChatOptions) -> None:
    """Answer the lines that are typed or piped in, until they end."""
    check_options(options)
    fields = [field for field in ("path", "compare") if getattr(options, field)]
    check_policies(options, {field: getattr(options, field) for field in fields})
    chats = [Chat(options, field) for field in fields]
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


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ChatOptions, talk, sys.argv[1:]))
