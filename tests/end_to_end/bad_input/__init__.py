"""Bad input as people give it, one `Case` each: the command, what it must say, its exit status.

Each module of this package is one section of the table and has a docstring (the heading) and a list
`CASES`. `test_bad_input.py` runs every case in the folder that `world.py` builds, in this
process, and holds `docs/bad-input.md` against what they print. After a change of a case or message:

    make bad-input

Leaves out what takes a kill, a full disk or several processes (`test_killed_runs.py` and others).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        what: what is wrong, in a few words, for a reader who sees the command next to it.
        command: `rlhf.sft model.path=model ...`, run as `python -m` in a copy of the world.
        says: texts that the message must contain: field, value and fix.
        prepare: changes the copy of the world before the command runs.
        status: exit status.
    """

    what: str
    command: str
    says: tuple[str, ...]
    prepare: Callable[[Path], object] | None = None
    status: int = 2


def sections() -> dict[str, list[Case]]:
    """The cases of every module, by the heading of its section."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names if name != "world"]
    return {str(module.__doc__).strip(): module.CASES for module in modules}
