"""What people see in the terminal: messages, tables, progress bars."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import hide

REPEAT_SECONDS = 3.0  # between the first process's error and that of another


def rank() -> int:
    """Number of this process among those that train."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True on the process that prints and writes."""
    return rank() == 0


def num_processes() -> int:
    """Number of processes that train."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_several_hosts() -> bool:
    """True if the launcher says that some processes run on other hosts."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes())) < num_processes()


def launched_with(name: str) -> bool:
    """True if `accelerate launch` asked for "FSDP" or "DeepSpeed"."""
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"


def say(text: str = "") -> None:
    """Print on the main process only."""
    if is_main_process():
        print(hide(text), flush=True)


def warn(text: str) -> None:
    """Print a warning, with its remedy, on the main process only."""
    if is_main_process():
        _print_apart(f"warning: {hide(text)}")


def print_error(text: str) -> None:
    """Print the error that ends this process. Most errors occur on all processes: the first one
    prints and exits, and the launcher then ends the others before they print."""
    if not is_main_process():
        time.sleep(REPEAT_SECONDS)
    print(f"error: {hide(text)}", file=sys.stderr, flush=True)


def _print_apart(text: str) -> None:
    """Print a line on stderr that no progress bar shares."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def accept_any_text() -> None:
    """Let a terminal or log in another encoding than UTF-8 show what it can: models say anything,
    and a character that cannot be written would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_help(text: str) -> None:
    """Print what `--help` says; a reader such as `head` may stop early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python writes the rest as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress_bar(total: int, done: int, unit: str) -> Any:
    """Return a tqdm bar for the main process, to be used with `with`, so that an error has a line
    of its own; in a log file it prints a line every ten seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, initial=done, unit=unit, mininterval=interval, disable=not is_main_process()
    )


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Lay out rows as plain text: numbers right-aligned, floats with four significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [
        all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))
    ]
    layout = [f"{'>' if right else '<'}{w}" for right, w in zip(is_number, widths, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ("  ".join(map(format, row, layout)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def interval_text(mean: float, low: float, high: float, digits: str = ".3g", sign: str = "") -> str:
    """Write a mean with its interval: "0.75 [0.7, 0.8]"; `sign="+"` shows the sign of the mean."""
    return f"{mean:{sign}{digits}} [{low:{digits}}, {high:{digits}}]"


def estimate_text(value: Mapping[str, float], sign: str = "") -> str:
    """As `interval_text`, of {"mean", "low", "high"}."""
    return interval_text(value["mean"], value["low"], value["high"], sign=sign)


def quiet_libraries() -> None:
    """Silence the libraries' progress bars, load reports and deprecations: the stages say what
    matters."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    # PEFT, of a base that is a GGUF file
    about_base = "(Unable to fetch remote file|Could not find a config file)"
    warnings.filterwarnings("ignore", message=about_base)
    # torch, of a sharded policy: nothing changes its outputs in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
