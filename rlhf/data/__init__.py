"""From files, Hub data sets or Python functions to token ids, for the three stages.

    source -> rows -> format -> canonical rows -> split by prompt -> token ids and labels -> batches

`reading` reads raw rows, `formats` and `instructions` make them canonical, `canonical` checks them,
`sources` drops and counts the bad ones and holds some out, `templates` finds chat templates and
their stop strings, `rendering` makes text of conversations and finds where answers begin and end,
`encoding` tokenises, `splitting` cuts long conversations, `mixing` adds plain text.

Canonical rows use TRL's column names. SFT: `messages`, or `prompt` and `completion` (both text or
both conversations). Reward: `prompt`, `responses`, `ranks` (0 = best, ties share a rank; a pair is
K = 2). PPO: `prompt`; PPO-ptx: `text`, or an SFT row. Other columns are kept under their own names.

Left out: packing (TRL does it), streaming, images, tool calls.
"""

from rlhf.data.canonical import DropRow, Row, check_row, prompt_of
from rlhf.data.encoding import (
    RankedCollator,
    encode_prompt,
    encode_prompts,
    encode_ranked,
    encode_response,
    encode_row,
    encode_samples,
    encode_sft,
    encode_texts,
    not_refused,
)
from rlhf.data.formats import FORMATS, resolve_format
from rlhf.data.mixing import mix_texts
from rlhf.data.rendering import Frame, RefusedConversation, answer_frame
from rlhf.data.sources import (
    Splits,
    describe_dropped,
    first_cases,
    load_rows,
    load_splits,
    split_by_prompt,
    to_conversation,
)
from rlhf.data.splitting import split_conversations
from rlhf.data.templates import chat_template_text, declare_stop_strings, stop_strings, template_of

__all__ = [
    "FORMATS",
    "DropRow",
    "Frame",
    "RankedCollator",
    "RefusedConversation",
    "Row",
    "Splits",
    "answer_frame",
    "chat_template_text",
    "check_row",
    "declare_stop_strings",
    "describe_dropped",
    "encode_prompt",
    "encode_prompts",
    "encode_ranked",
    "encode_response",
    "encode_row",
    "encode_samples",
    "encode_sft",
    "encode_texts",
    "first_cases",
    "load_rows",
    "load_splits",
    "mix_texts",
    "not_refused",
    "prompt_of",
    "resolve_format",
    "split_by_prompt",
    "split_conversations",
    "stop_strings",
    "template_of",
    "to_conversation",
]
