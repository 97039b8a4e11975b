"""Talking to trained policies, in the terminal or in a web page; the command is in `__main__`."""

from rlhf.chat.conversation import Chat, ChatOptions
from rlhf.chat.terminal import printable, talk
