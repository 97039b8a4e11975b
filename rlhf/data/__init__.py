"""From files, Hub data sets or Python functions to token ids, for the three stages.

    source -> rows -> format -> canonical rows, split by prompt -> token ids and labels -> batches
    read              formats   sources                            segments, encode        encode

`rows` says what a canonical row is, `dropped` counts the rows that are left out.

Canonical rows use TRL's column names. SFT: `messages`, or `prompt` and `completion` (both text or
both conversations), or `text`. Reward: `prompt`, `responses`, `ranks` (0 = best, ties share a rank;
a pair is K = 2). PPO: `prompt`; PPO-ptx: `text`, or an SFT row. Other columns keep their names.

Left out: packing (TRL does it), streaming, images, tool calls.
"""

from rlhf.data.dropped import describe_dropped, first_cases
from rlhf.data.encode import (
    RankedCollator,
    encode_prompts,
    encode_ranked,
    encode_sft,
    encode_text,
    encode_texts,
    not_refused,
    pad,
)
from rlhf.data.formats import FIELDS, FORMATS, resolve_format
from rlhf.data.read import read_lines, read_rows
from rlhf.data.rows import (
    BadRow,
    DropRow,
    Row,
    as_messages,
    as_prompt,
    as_text,
    check_row,
    different_prompts,
    is_text,
    other_columns,
    prompt_of,
    repaired,
    whole_characters,
)
from rlhf.data.rows_in_memory import with_rows
from rlhf.data.segments import encode_prompt, encode_response, encode_row, encode_samples
from rlhf.data.sources import (
    Splits,
    count_overlap,
    few_rows,
    load_rows,
    load_splits,
    to_conversation,
)

# Names that earlier versions had here.
from rlhf.tokenizer import (
    RefusedConversation,
    answer_frame,
    chat_template_text,
    declare_stop_strings,
    stop_strings,
)
