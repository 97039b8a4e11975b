"""Talk to a policy: python -m rlhf.chat path=runs/demo/sft/final

    python -m rlhf.chat path=runs/mine/ppo/final web=true
    python -m rlhf.chat path=[runs/mine/sft/final,runs/mine/ppo/final] web=true out=rankings.jsonl

Answers are sampled by the same loop as in PPO, and shown as they come. When the context is full,
the oldest rounds are left out.

In the terminal, questions can be piped in, one per line: answers go to stdout, remarks to stderr.
Each line is a conversation of its own, unless one_conversation=true. /reset forgets the
conversation, /undo forgets its last round, /exit or Ctrl-D leaves. Ctrl-C stops an answer; the part
that was printed stays in the conversation. Several models have a history each.

With web=true a page in the browser shows the answers of several models side by side. Mark the
better one: the conversation goes on from it, and `out` gets a row of ranks that
`python -m rlhf.reward` reads. It needs pip install 'rlhf[web]'.

A model continues each line as text if it has no chat template or was trained on text prompts.
"""

from __future__ import annotations

import sys

from rlhf.chat.conversation import ChatOptions
from rlhf.chat.terminal import talk
from rlhf.option_parser import run_command


def run(options: ChatOptions) -> None:
    """Talk in the terminal, or serve the page."""
    if not options.web:
        talk(options)
        return
    from rlhf.chat.serving import serve_page

    serve_page(options)


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ChatOptions, run, sys.argv[1:]))
