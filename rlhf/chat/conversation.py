"""A model and its side of a conversation; the options of `python -m rlhf.chat`.

Left out: where questions come from (`terminal`, `web`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf.config import knob
from rlhf.data import whole_characters
from rlhf.policy import Policy, PolicyOptions
from rlhf.web.server import ServerOptions

INCOMPLETE = "\ufffd"  # a decoder's sign for bytes that do not (or not yet) form a character


@dataclass
class ChatOptions(ServerOptions, PolicyOptions):
    """The command line."""

    path: list[str]  # type: ignore[assignment]
    """Stage directory, other model directory or Hub id; several that are compared: [a,b]."""
    compare: str | None = None
    """A second model, as in path=[a,b]."""
    one_conversation: bool = False
    """true: the lines that are piped in are one conversation."""
    web: bool = False
    """true: serve a page in the browser, on this machine."""
    out: str = "chat.rankings.jsonl"
    """With web=true: file of the answers that you marked, for python -m rlhf.reward."""
    port: int = knob(8766, ge=0, le=65535)
    """Port of the page; 0 takes a free one."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, list):  # of a caller in Python
            self.path = [str(self.path)]

    @property
    def models(self) -> dict[str, str]:
        """Name of an option -> the model that it names."""
        found = {f"path[{i}]" if i else "path": path for i, path in enumerate(self.path)}
        return found | ({"compare": self.compare} if self.compare else {})


def note(text: str) -> None:
    """Print a remark on stderr: stdout has the answers alone."""
    print(text, file=sys.stderr, flush=True)


class Chat(Policy):
    """A model, and its side of the conversation.

    Attributes:
        note: what gets remarks, such as that the context is full.
        rounds: (question, answer) pairs, oldest first; empty if lines are continued as text.
        cut_off: True if the last answer used up its budget.
    """

    def __init__(self, options: ChatOptions, path: str | None = None, field: str = "path"):
        """Load a model.

        Args:
            path: None for the first one of the options.
            field: option that names it, for messages.
        """
        super().__init__(options, path or options.path[0], field)
        self.note: Callable[[str], None] = note
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
            self.note(
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
                self.note(
                    f"[the context of {context} tokens is full: the oldest rounds are left out]"
                )
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
