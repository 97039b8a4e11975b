"""Everything that is known about a tokenizer.

`special_tokens` loads it, `templates` finds its chat template and the stop strings declared there,
`rendering` makes text of conversations and finds where answers begin and end, `stop_strings` ends a
response, `identity` tells whether two tokenizers are the same.
"""

from rlhf.tokenizer.identity import hash_rendering, hash_template, hash_tokenizer
from rlhf.tokenizer.rendering import Frame, Message, RefusedConversation, answer_frame
from rlhf.tokenizer.special_tokens import (
    PAD_TOKEN,
    forbidden_token_ids,
    load_tokenizer,
    num_tokens,
    read_tokenizer,
)
from rlhf.tokenizer.stop_strings import StopStrings, before_stop, end_token_ids, response_text
from rlhf.tokenizer.templates import (
    chat_template_text,
    declare_stop_strings,
    stop_strings,
    template_of,
)
