"""What an examination found, and how the preflight prints it."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import stage_command

WIDTH, INDENT = 110, 20  # characters
OK, WARN, FAIL = "ok", "WARN", "FAIL"


@dataclass
class Finding:
    """What one examination found."""

    name: str
    status: str  # "ok", "WARN" or "FAIL"
    text: str  # the result, with its number
    remedy: str = ""  # what to do about it; empty when ok
    details: str = ""  # lines to print below, unchanged
    override: str = ""  # key=value that mends it, where there is one


def lay_out(findings: Sequence[Finding]) -> str:
    """Lay out findings, a line each, with the remedy below."""
    lines = []
    for finding in findings:
        head = f"{finding.status:<6}{finding.name:<{INDENT - 6}}"
        lines += textwrap.wrap(head + finding.text, WIDTH, subsequent_indent=" " * INDENT)
        lines += [" " * INDENT + line for line in finding.details.splitlines()]
        if finding.remedy:
            arrow = " " * (INDENT - 3) + "-> "
            lines += textwrap.wrap(arrow + finding.remedy, WIDTH, subsequent_indent=" " * INDENT)
    return "\n".join(lines)


def bottom_line(findings: Sequence[Finding]) -> str:
    """Sum up findings: "ok", "2 warnings" or "failed: memory, scorer"."""
    failed = [finding.name for finding in findings if finding.status == FAIL]
    num_warnings = sum(finding.status == WARN for finding in findings)
    if failed:
        return f"failed: {', '.join(failed)}"
    return f"{num_warnings} warning{'s' * (num_warnings > 1)}" if num_warnings else "ok"


def mended_command(findings: Sequence[Finding]) -> str:
    """The command of this process with the overrides that mend what failed; the overrides alone
    where PPO was started by other code; empty if there are none."""
    overrides = [f.override for f in findings if f.status == FAIL and f.override]
    if not overrides or not sys.argv[0].endswith("rlhf/ppo/__main__.py"):
        return " ".join(overrides)
    keys = tuple(override.partition("=")[0] + "=" for override in overrides)
    kept = [argument for argument in sys.argv[1:] if not argument.startswith(keys)]
    return stage_command("ppo", [shlex.quote(o) for o in [*kept, *overrides]])
