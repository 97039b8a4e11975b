"""`python -m rlhf.generate`: `mode=` chooses the command, and each has its own `--help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rlhf.generate import GenerateOptions, sample, score_rows, self_chat, self_instruct, two_agents
from rlhf.option_parser import run_command

MODES: dict[str, tuple[Any, Any]] = {
    "sample": (sample, GenerateOptions),
    "self_instruct": (self_instruct, self_instruct.SelfInstructOptions),
    "self_chat": (self_chat, self_chat.SelfChatOptions),
    "two_agents": (two_agents, two_agents.TwoAgentsOptions),
    "score_rows": (score_rows, score_rows.ScoreRowsOptions),
}
AGAIN = "interrupted; the same command continues"


def main(arguments: Sequence[str]) -> int:
    """Run the mode that `mode=` names; return the exit status."""
    mode, rest = "sample", []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "mode" and equals:
            mode = value
        else:
            rest.append(argument)
    if mode not in MODES:
        print(f"error: mode={mode} is not one of {', '.join(MODES)}", file=sys.stderr)
        return 2
    module, options = MODES[mode]
    return run_command(str(module.__doc__), options, module.run, rest, AGAIN)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
