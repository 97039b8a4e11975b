"""From files, Hub data sets or Python functions to token ids, for the three stages.

    source -> rows -> format -> canonical rows -> split by prompt -> token ids and labels -> batches

`read` reads raw rows, `formats` makes them canonical, `rows` says what a canonical row is, `splits`
drops and counts the bad ones and holds some out, `encode` makes token ids.

Canonical rows use TRL's column names. SFT: `messages`, or `prompt` and `completion` (both text or
both conversations). Reward: `prompt`, `responses`, `ranks` (0 = best, ties share a rank; a pair is
K = 2). PPO: `prompt`; PPO-ptx: `text`, or an SFT row. Other columns are kept under their own names.

Left out: packing (TRL does it), streaming, images, tool calls.
"""

from rlhf.data.encode import (
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
from rlhf.data.rows import (
    DropRow,
    Row,
    as_messages,
    as_prompt,
    as_text,
    check_row,
    prompt_of,
    whole_characters,
)
from rlhf.data.splits import (
    Splits,
    describe_dropped,
    first_cases,
    load_rows,
    load_splits,
    split_by_prompt,
    to_conversation,
)
