"""Talk to a policy in the terminal: python -m rlhf.chat path=runs/demo/sft/final

Answers are sampled by the same loop as in PPO, and printed as they come. Questions can be piped in,
one per line: answers go to stdout, remarks to stderr. When the context is full, the oldest rounds
are left out.

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
from pathlib import Path
from typing import Any

from rlhf.config import InputError, ModelConfig, knob, nearest
from rlhf.console import quiet_libraries
from rlhf.data import whole_characters
from rlhf.options import check_options, run_command

COMMANDS = ("/reset", "/undo", "/exit")
OBEYED = {"temperature", "top_p", "top_k", "do_sample"}  # settings that our sampling loop has
INCOMPLETE = "\ufffd"  # a decoder's sign for bytes that do not (or not yet) form a character


@dataclass
class ChatOptions:
    """The command line."""

    path: str
    """Stage directory, other model directory or Hub id."""
    compare: str | None = None
    """A second model; it answers every question too and has a history of its own."""
    system: str | None = None
    """System message."""
    chat_template: str | None = None
    """Replaces the model's own template: plain, alpaca or a .jinja file."""
    temperature: float | None = knob(None, ge=0)
    """0 always takes the likeliest token (default: the model's generation config, else 1)."""
    top_p: float | None = knob(None, gt=0, le=1)
    """Share of the probability to sample from (default: the generation config, else off)."""
    top_k: int | None = knob(None, ge=0)
    """Number of likeliest tokens to sample from (default: the generation config, else off)."""
    max_new_tokens: int = knob(256, ge=1)
    """Longest answer, tokens."""
    seed: int = knob(1, ge=0)
    """Equal seeds give equal answers."""
    device: str | None = None
    """Device such as cpu or cuda:1 (default: a GPU if there is one)."""
    trust_remote_code: bool = False
    """true: the model's own Python files may run."""


def note(text: str) -> None:
    """Print a remark on stderr: stdout has the answers alone."""
    print(text, file=sys.stderr, flush=True)


# --- One model and its conversation -------------------------------------------------------------


class Chat:
    """A model, and its side of the conversation.

    Attributes:
        rounds: (question, answer) pairs, oldest first; empty if lines are continued as text.
        why_text: reason why lines are continued as text; None in a conversation.
        cut_off: True if the last answer used up its budget.
    """

    def __init__(self, options: ChatOptions, field: str = "path"):
        """Load the model that `field` of the options names."""
        from rlhf.equivalence import require_cache
        from rlhf.sampling import sampling_for

        self.options, self.path = options, str(getattr(options, field))
        self.model, self.tokenizer, self.record, has_template = _load(options, self.path, field)
        where, fix = f"{field}={self.path}", "take a model of another family"
        require_cache(self.model, self.tokenizer, where, fix, num_rows=1)
        self.why_text = None
        if options.chat_template is None:
            if not has_template:
                self.why_text = "it has no chat template"
            elif self.record and self.record.prompts == "text":
                self.why_text = "it was trained on text prompts"
        if self.why_text and options.system is not None:
            raise InputError(
                f"{where} takes no system message: {self.why_text}; leave system out, or add "
                "chat_template=plain or chat_template=alpaca"
            )
        # the options, else the generation config, else plain sampling
        configured = self.model.generation_config
        greedy = configured.do_sample is False
        settings: dict[str, Any] = {"temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "top_k": 0}
        for source in [options] if greedy else [configured, options]:
            given = {name: getattr(source, name, None) for name in settings}
            settings |= {name: value for name, value in given.items() if value is not None}
        self.temperature = settings["temperature"]
        self.sampling = sampling_for(
            self.model,
            self.tokenizer,
            options.max_new_tokens,
            self.temperature or 1.0,  # for greedy answers the divisor of the logits is irrelevant
            settings["top_p"],
            int(settings["top_k"]),
        )
        self.rounds: list[tuple[str, str]] = []
        self.cut_off = False
        self._said_full = False

    def describe(self) -> str:
        """Say what was loaded, how it samples, and which generation settings are not applied."""
        from rlhf.models import parameter_count, sampling_settings

        s, stage = self.sampling, f"{self.record.stage} stage, " if self.record else ""
        lines = [
            f"{self.path}: {stage}{type(self.model).__name__}, "
            f"{parameter_count(self.model)[0]:,} parameters on {self.model.device}; "
            f"temperature {self.temperature:g}, top_p {s.top_p:g}, top_k {s.top_k}, "
            f"at most {s.max_new_tokens} tokens an answer"
        ]
        if self.why_text:
            lines.append(
                f"  {self.why_text}: it continues each line as text and does not see earlier lines "
                "(chat_template=alpaca or plain turns lines into questions)"
            )
        configured = sampling_settings(self.model)
        others = [f"{name}={configured[name]}" for name in configured if name not in OBEYED]
        if others:
            lines.append(f"  not applied from its generation config: {', '.join(others)}")
        return "\n".join(lines)

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
            yield self._text(ids)[num_shown:]
            stops = sampling.stop_strings
            self.cut_off = ids[-1] not in sampling.stop_ids and not (stops and stops.end(ids))
        finally:
            if not self.why_text:
                self.rounds.append((question, self._text(ids)))

    def _settled_text(self, ids: list[int]) -> str:
        """The text that no later token can change.

        Held back are an incomplete character, the chat template's text around an answer, and the
        beginning of a stop string with the whitespace before it.
        """
        from rlhf.tokenizer import Frame, answer_frame

        text = self._text(ids).rstrip(INCOMPLETE)
        frame = Frame() if self.why_text else answer_frame(self.tokenizer)
        if frame.lead.startswith(text):
            return ""
        stops = self.sampling.stop_strings
        ends = [frame.tail, *(stops.strings if stops else ())]
        starts = (end[:n] for end in ends for n in range(1, len(end)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        text = text[: len(text) - held]
        return text.rstrip() if stops else text

    def _text(self, ids: list[int]) -> str:
        from rlhf.tokenizer import response_text

        return response_text(ids, self.tokenizer, "" if self.why_text else None)

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
        from rlhf.data import encode_prompt

        if self.why_text:
            return encode_prompt(question, self.tokenizer)
        said = []
        if self.options.system is not None:
            said = [("system", whole_characters(self.options.system))]
        for asked, answered in rounds:
            said += [("user", asked), ("assistant", answered)]
        said.append(("user", question))
        return encode_prompt([{"role": r, "content": c} for r, c in said], self.tokenizer)

    def undo(self) -> None:
        """Forget the last round."""
        self.rounds = self.rounds[:-1]

    def reset(self) -> None:
        """Forget the conversation."""
        self.rounds, self._said_full = [], False


def _load(options: ChatOptions, path: str, field: str) -> tuple[Any, Any, Any, bool]:
    """Model, tokenizer, record of the stage, and whether it has a chat template of its own."""
    import torch

    from rlhf.checkpoint import require_stage
    from rlhf.distributed import default_device
    from rlhf.models import load_policy
    from rlhf.tokenizer import load_tokenizer, read_tokenizer

    quiet_libraries()
    device = options.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device={device} cannot be used here ({reason})") from error
    if (Path(path) / "policy.safetensors").is_file():
        raise InputError(
            f"{field}={path} is a PPO checkpoint; make a model directory from it with "
            f"python -m rlhf.export path={path} out=<directory>"
        )
    record = require_stage(path, ("sft", "ppo"), field)
    template, code = options.chat_template, options.trust_remote_code
    config = ModelConfig(path=path, dtype="auto", chat_template=template, trust_remote_code=code)
    tokenizer = load_tokenizer(config, field)
    model: Any = load_policy(config, tokenizer, field)
    # `load_tokenizer` adds a template where there is none; only stages save such a template
    own = record or read_tokenizer(config, field).chat_template
    return model.to(device), tokenizer, record, bool(own)


# --- The terminal -------------------------------------------------------------------------------


def talk(options: ChatOptions) -> None:
    """Answer the lines that are typed or piped in, until they end."""
    check_options(options)
    chats = [Chat(options, field) for field in ("path", "compare") if getattr(options, field)]
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
        note(f"[cut off: max_new_tokens={chat.options.max_new_tokens}, or the end of the context]")


def printable(text: str) -> str:
    """Replace control characters: with them a model could control the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", INCOMPLETE, text)


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ChatOptions, talk, sys.argv[1:]))
