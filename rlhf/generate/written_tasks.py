"""Tasks as a language model writes them: the prompt, the reading of its list, the filter.

The rules are those of Self-Instruct as Stanford Alpaca used it (Wang et al. 2023, arXiv:2212.10560,
section 2.2; Taori et al. 2023); the wording of the prompt is ours. ROUGE-L compares words that are
separated by spaces or punctuation, so that it sees little in a script without spaces. Left out: the
second round of Self-Instruct, which asks for the outputs one by one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.config import InputError
from rlhf.generate.author import THOUGHTS_END

PROMPT = """\
Below is the beginning of a list of {total} tasks for an assistant that reads and writes text. \
Each task has an instruction, an input and an output. Complete the list.

- No two tasks are alike: vary the subject, the kind of work, the length and the wording; mix \
questions and orders.
- An instruction is one or two sentences, in the language of the tasks below.
- Text is enough for every task: it needs no pictures, sounds, files or web pages, and nothing \
that has to be done later.
- The input holds what the instruction works on, such as a text or facts, in at most 100 words; \
write <noinput> where the instruction needs none.
- The output is what a careful expert would answer, in at most 100 words.
"""
NO_INPUT = re.compile(r"<?\s*no\s*input\s*>?", re.I)
HEADER = re.compile(
    r"^[#*\s]*(\d+)\s*[.)][*\s]*(Instruction|Input|Output)\s*:[*]*[ \t]*", re.M | re.I
)
SEPARATOR = re.compile(r"^\s*#{3,}\s*$", re.M)
BLACKLIST = (
    "image images graph graphs picture pictures file files map maps draw plot video audio music "
    "flowchart diagram"
).split() + ["go to"]
CUT = "cut off by the end of the answer"


class Task(NamedTuple):
    """A task; `input` may be empty."""

    instruction: str
    input: str
    output: str


# --- Asking and reading ---------------------------------------------------------------------------


def prompt_of_list(examples: Sequence[Task], total: int, continues: bool) -> str:
    """Ask for a list that begins with the examples.

    Args:
        total: number of tasks in the list, with the examples.
        continues: the model continues text; the prompt then ends inside the list.
    """
    first = len(examples) + 1
    parts = [PROMPT.format(total=total)]
    for number, (instruction, given, output) in enumerate(examples, start=1):
        instruction = " ".join(instruction.split()).rstrip(":")
        parts.append(
            f"###\n{number}. Instruction: {instruction}\n{number}. Input: {given or '<noinput>'}\n"
            f"{number}. Output: {output}"
        )
    if continues:
        return "\n".join([*parts, f"###\n{first}. Instruction:"])
    end = f"Go on with task {first}, in the same form, and end after task {total}."
    return "\n".join([*parts, "###", "", end])


def read_list(text: str, first: int, total: int, continues: bool, ended: bool) -> list[Task | str]:
    """Read the tasks of an answer; where one cannot be read there is the reason.

    Args:
        first: number of the first task that was asked for.
        total: number at which the list ends; it is not read, nor what comes after it.
        ended: the answer ended by itself; else its last task may be cut off and is not taken.
    """
    text = text.rpartition(THOUGHTS_END)[2]
    if continues:
        text = f"{first}. Instruction: {text}"
    headers = list(HEADER.finditer(text))
    found: list[dict[str, str]] = []
    for i, header in enumerate(headers):
        end = headers[i + 1].start() if i + 1 < len(headers) else len(text)
        name = header[2].lower()
        if name == "instruction":
            if int(header[1]) >= total:  # where the list ends, as in Alpaca's generator
                ended = True
                break
            found.append({})
        if found:
            content = SEPARATOR.split(text[header.end() : end])[0].strip()
            found[-1].setdefault(name, content)
    tasks: list[Task | str] = [_task(parts) for parts in found]
    if tasks and not ended:
        tasks[-1] = CUT
    return tasks


def _task(parts: dict[str, str]) -> Task | str:
    if not {"instruction", "output"} <= parts.keys():
        return "not in the form that was asked for"
    given = parts.get("input", "")
    if NO_INPUT.fullmatch(given):
        given = ""
    return Task(" ".join(parts["instruction"].split()), given, parts["output"])


# --- The filter -----------------------------------------------------------------------------------


class Rules:
    """What an instruction must be like."""

    def __init__(
        self, min_words: int, max_words: int, blacklist: Sequence[str], keep_non_ascii: bool
    ):
        self.min_words, self.max_words = min_words, max_words
        self.keep_non_ascii = keep_non_ascii
        words = "|".join(map(re.escape, blacklist))
        self.blacklist = re.compile(rf"\b(?:{words})\b" if words else r"(?!)", re.I)

    def fault(self, task: Task) -> str | None:
        """Why a task is left out, or None."""
        instruction, num_words = task.instruction, len(task.instruction.split())
        if not task.output:
            return "without an output"
        if num_words < self.min_words:
            return f"an instruction of fewer than {self.min_words} words"
        if num_words > self.max_words:
            return f"an instruction of more than {self.max_words} words"
        if self.blacklist.search(instruction):
            return "with a word of the blacklist"
        if instruction.lower().startswith("write a program"):
            return "asks for a program"
        if instruction[0] in string.punctuation:
            return "begins with punctuation"
        if not (instruction[0].isascii() or self.keep_non_ascii):
            return "begins outside ASCII (keep_non_ascii=true keeps these)"
        return None


class Earlier:
    """Instructions that are there already, and how similar a new one is to them.

    ROUGE-L F of two texts with m and n words is 2 L / (m + n), where L is the length of their
    longest common subsequence. A word is a character of a string here, for rapidfuzz.

    Worked example: "sort these five names" and "sort these names by age" share "sort these names":
    2 * 3 / (4 + 5) = 0.667.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts: list[str] = []
        self._codes: list[str] = []
        self._characters: dict[str, str] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._codes.append(self._code(text))

    def closest(self, texts: Sequence[str], start: int = 0) -> Iterator[tuple[float, str]]:
        """The highest ROUGE-L F of each text with those from number `start` on, and with which."""
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import cdist

        new, old = [self._code(text) for text in texts], self._codes[start:]
        if not new:
            return
        common = cdist(new, old, scorer=LCSseq.similarity, dtype=np.uint16)
        num_words = np.add.outer([len(code) for code in new], [len(code) for code in old])
        scores = 2.0 * common / np.maximum(num_words, 1)
        for row, best in zip(scores, scores.argmax(axis=1), strict=True):
            yield float(row[best]), self.texts[start + best]

    def _code(self, text: str) -> str:
        known = self._characters
        words = re.findall(r"[^\W_]+", text.lower())
        return "".join(known.setdefault(word, chr(0xE000 + len(known))) for word in words)


def require_rapidfuzz() -> None:
    """Raise InputError where rapidfuzz is not installed."""
    try:
        import rapidfuzz  # noqa: F401
    except ImportError as error:
        raise InputError("self_instruct needs rapidfuzz: pip install 'rlhf[generate]'") from error
