"""`output.log`: what a run shows in the terminal, kept in its stage directory.

Of a progress bar, only the last state is kept. What is shown before the directory exists is written
once it does; a run that continues appends. Left out: what native code prints.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from rlhf.config import InputError, hide
from rlhf.console import is_main_process

OUTPUT = "output.log"


class OutputLog:
    """The lines that were shown; in memory until `begin` names the directory."""

    def __init__(self) -> None:
        self._early: list[str] = []
        self._file: TextIO | None = None
        self._ended = False

    def begin(self, directory: Path) -> None:
        """Write to the file in this directory from now on."""
        if is_main_process():
            self._file = (directory / OUTPUT).open("a", encoding="utf-8", errors="backslashreplace")
            self.add(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(self._early)}")

    def add(self, text: str) -> None:
        """Write one or several whole lines."""
        if self._file is None:
            self._early += [] if self._ended else [text]
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # the run goes on, until its own files cannot be written
            what = f"warning: {self._file.name} cannot be written ({error}) and ends here"
            self._file, self._ended = None, True
            print(what, file=sys.__stderr__)

    def end(self) -> None:
        """Close the file; a library may still hold our streams."""
        if self._file is not None:
            self._file.close()
        self._file, self._ended = None, True


class _Shown:
    """A stream of the terminal whose lines are also written to the log."""

    def __init__(self, stream: Any, log: OutputLog):
        self._stream, self._log = stream, log
        self._line, self._is_bar = "", False

    def write(self, text: str) -> Any:
        written = self._stream.write(text)
        for piece in re.findall(r"\r?\n|\r|[^\r\n]+", text):
            if piece.endswith("\n"):
                self._log.add(self._line.rstrip() + "\n")
                self._line, self._is_bar = "", False
            elif piece == "\r":  # a progress bar is drawn again
                self._line, self._is_bar = "", True
            elif self._is_bar and self._line:  # a message ends the line of the bar
                self._line, self._is_bar = piece, False
            else:
                self._line += piece
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept_output() -> Iterator[OutputLog]:
    """Copy what is shown, and the error that ends the run, to the log."""
    log = OutputLog()
    with redirect_stdout(_Shown(sys.stdout, log)), redirect_stderr(_Shown(sys.stderr, log)):
        try:
            yield log
        except InputError as error:
            log.add(f"error: {hide(str(error))}\n")
            raise
        except BaseException:
            log.add(hide(traceback.format_exc()))
            raise
        finally:
            log.end()
