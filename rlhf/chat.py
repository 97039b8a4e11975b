"""Talk to a policy in the terminal: python -m rlhf.chat path=runs/demo/sft/final

Answers are sampled by the loop that PPO samples with, and printed as they come. Options, each as
key=value:

    path            stage directory, other model directory or Hub id
    compare         a second one; it answers every question too, with a history of its own
    system          system message
    chat_template   in place of the model's own: plain, alpaca or a .jinja file
    temperature     0: always the likeliest token (default: the generation config's, else 1)
    top_p, top_k    restrict the choice (default: the generation config's, else off)
    max_new_tokens  budget of an answer (256)
    seed            equal seeds give equal answers (1)
    device          such as cpu or cuda:1 (default: a GPU where there is one)
    trust_remote_code  true: a model's own Python files may run (false)

/reset forgets the conversation, /undo its last round; /exit or Ctrl-D leaves. Ctrl-C stops an
answer, and what was said of it counts. Questions can be piped in, one per line: answers go to
stdout, remarks to stderr. Where the context is full, the oldest rounds are left out.

A model without a chat template, or one trained on text prompts, continues each line as it stands.
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

from rlhf.cli import run_command
from rlhf.config import InputError, ModelConfig, check_finite, nearest
from rlhf.data.rows import whole_characters

COMMANDS = ("/reset", "/undo", "/exit")
OBEYED = {"temperature", "top_p", "top_k", "do_sample"}  # of a generation config, by our loop
INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


@dataclass
class ChatOptions:
    """The command line; see the module's docstring."""

    path: str | None = None
    compare: str | None = None
    system: str | None = None
    chat_template: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 256
    seed: int = 1
    device: str | None = None
    trust_remote_code: bool = False


def check(options: ChatOptions) -> None:
    """Check the values before anything loads.

    Raises:
        InputError: a value is missing or out of range.
    """
    if not options.path:
        raise InputError("path is missing: give a stage directory, e.g. path=runs/demo/sft/final")
    check_finite(options)
    rules = {
        "max_new_tokens": (1 <= options.max_new_tokens, ">= 1"),
        "temperature": (0 <= (options.temperature or 0), ">= 0"),
        "top_p": (options.top_p is None or 0 < options.top_p <= 1, "in (0, 1]"),
        "top_k": (0 <= (options.top_k or 0), ">= 0"),
        "seed": (0 <= options.seed, ">= 0"),
    }
    for name, (holds, expected) in rules.items():
        if not holds:
            raise InputError(f"{name} must be {expected}, got {getattr(options, name)}")


def note(text: str) -> None:
    """Say something that is no answer: answers alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


# --- One model and its conversation -------------------------------------------------------------


class Chat:
    """A model, and its side of the conversation.

    Attributes:
        rounds: (question, answer) pairs, oldest first; none where lines are continued as text.
        why_text: why lines are continued as they stand; None in a conversation.
        cut_off: True where the last answer used up its budget.
    """

    def __init__(self, options: ChatOptions, field: str = "path"):
        """Load the model that `field` of the options names.

        Raises:
            InputError: nothing can be loaded from there, or it is no policy.
        """
        from rlhf.promises import require_cache
        from rlhf.sampling import sampling_for

        self.options, self.path = options, str(getattr(options, field))
        self.model, self.tokenizer, self.record, has_template = _load(options, self.path, field)
        where, fix = f"{field}={self.path}", "take a model of another family"
        require_cache(self.model, self.tokenizer, where, fix, num_rows=1)
        self.why_text = None
        if options.chat_template is None and not has_template:
            self.why_text = "it has no chat template"
        elif options.chat_template is None and self.record and self.record.prompts == "text":
            self.why_text = "it was trained on text prompts"
        if self.why_text and options.system is not None:
            raise InputError(
                f"system has no place in {field}={self.path}: {self.why_text}; add "
                "chat_template=plain or chat_template=alpaca"
            )
        self.temperature, top_p, top_k = self._knobs()
        self.sampling = sampling_for(
            self.model,
            self.tokenizer,
            options.max_new_tokens,
            self.temperature or 1.0,  # 0 is greedy, whatever the logits are divided by
            top_p,
            top_k,
        )
        self.rounds: list[tuple[str, str]] = []
        self.cut_off = False
        self._said_full = False

    def _knobs(self) -> tuple[float, float, int]:
        """temperature, top_p and top_k: the options, else the generation config, else plain."""
        configured = self.model.generation_config
        greedy = configured.do_sample is False
        plain = {"temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "top_k": 0}
        theirs = {} if greedy else {name: getattr(configured, name, None) for name in plain}
        ours = {name: getattr(self.options, name) for name in plain}
        for values in (theirs, ours):
            plain |= {name: value for name, value in values.items() if value is not None}
        return plain["temperature"], plain["top_p"], int(plain["top_k"])

    def describe(self) -> str:
        """Say what was loaded, how it samples, and what of its generation config is not obeyed."""
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
                f"  {self.why_text}: each line is continued as it stands, without the lines "
                "before it (chat_template=alpaca or plain makes questions of them)"
            )
        configured = sampling_settings(self.model)
        others = {name: value for name, value in configured.items() if name not in OBEYED}
        if others:
            values = ", ".join(f"{name}={value}" for name, value in others.items())
            lines.append(f"  not applied, of its generation config: {values}")
        return "\n".join(lines)

    def ask(self, question: str, number: int) -> Iterator[str]:
        """Sample an answer, yield its text as it comes, and remember the round.

        A round that is given up (the generator is closed, or Ctrl-C) keeps what was said.

        Args:
            number: names the random numbers, together with the seed.
        """
        from rlhf.sampling import stream, uniform_noise

        question = whole_characters(question)
        prompt_ids, room = self._prompt(question)
        if room < 1:
            note(
                f"[not answered: these are {len(prompt_ids)} tokens, and the model's context has "
                f"{len(prompt_ids) + room}]"
            )
            return
        sampling = dataclasses.replace(
            self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room)
        )
        noise = None
        if self.temperature:
            noise = uniform_noise((self.options.seed, number), [0], sampling.max_new_tokens)
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
            ended = ids[-1] in sampling.stop_ids or (stops is not None and stops.end(ids))
            self.cut_off = not ended
        finally:
            if not self.why_text:
                self.rounds.append((question, self._text(ids)))

    def _settled_text(self, ids: list[int]) -> str:
        """What is said for good: without an incomplete character, or what may yet become a stop
        string and the whitespace before it, or the chat template's text around an answer."""
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

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids up to the answer, and the room for it, tokens; negative if there is none.

        The oldest rounds are forgotten until an answer of full length fits, or one of half the
        context.
        """
        from rlhf.sampling import context_length

        context = context_length(self.model)
        reserve = min(self.sampling.max_new_tokens, context // 2)
        kept = self.rounds
        ids = self._encode(question, kept)
        while kept and len(ids) + reserve > context:
            kept = kept[1:]
            ids = self._encode(question, kept)
        if len(ids) < context:
            if len(kept) < len(self.rounds) and not self._said_full:
                note(f"[the context of {context} tokens is full: the oldest rounds are left out]")
                self._said_full = True
            self.rounds = kept
        return ids, context - len(ids)

    def _encode(self, question: str, rounds: list[tuple[str, str]]) -> list[int]:
        from rlhf.data import encode_prompt

        if self.why_text:
            return encode_prompt(question, self.tokenizer)
        system = self.options.system
        messages = []
        if system is not None:
            messages.append({"role": "system", "content": whole_characters(system)})
        for asked, answered in rounds:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": question})
        return encode_prompt(messages, self.tokenizer)

    def undo(self) -> None:
        """Forget the last round."""
        self.rounds = self.rounds[:-1]

    def reset(self) -> None:
        """Forget the conversation."""
        self.rounds, self._said_full = [], False


def _load(options: ChatOptions, path: str, field: str) -> tuple[Any, Any, Any, bool]:
    """Model, tokenizer, record of the stage, and whether it has a chat template of its own."""
    import torch
    import transformers

    from rlhf.checkpoint import require_stage
    from rlhf.models import load_policy
    from rlhf.tokenizer import load_tokenizer, read_tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device={device} cannot be used here ({reason})") from error
    if (Path(path) / "policy.safetensors").is_file():
        raise InputError(
            f"{field}={path} is a PPO checkpoint; make a model directory of it with "
            f"python -m rlhf.export path={path} out=<directory>"
        )
    record = require_stage(path, ("sft", "ppo"), field)
    config = ModelConfig(
        path=path,
        dtype="auto",
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = load_tokenizer(config, field)
    model: Any = load_policy(config, tokenizer, field)
    # `load_tokenizer` has put a template in where there was none; a stage has saved it
    own = record or read_tokenizer(config, field).chat_template
    return model.to(device), tokenizer, record, bool(own)


# --- The terminal -------------------------------------------------------------------------------


def talk(options: ChatOptions) -> None:
    """Answer what is typed, or piped in, until it ends."""
    check(options)
    chats = [Chat(options, field) for field in ("path", "compare") if getattr(options, field)]
    for chat in chats:
        note(chat.describe())
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 become U+FFFD
    if interactive:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401  editing and history of the line that is typed

        note(f"{' '.join(COMMANDS)}; Ctrl-C stops an answer, Ctrl-D leaves")
    for number, line in enumerate(_lines(interactive)):
        command = line.strip()
        if command == "/exit":
            return
        if command in COMMANDS:
            for chat in chats:
                (chat.undo if command == "/undo" else chat.reset)()
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
                note("")  # the shell's prompt begins a line
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
    """Replace control characters, with which a model could drive the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", INCOMPLETE, text)


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ChatOptions, talk, sys.argv[1:]))
