"""All knowledge about a tokenizer. Importing this room does not import torch.

`load` loads it, `special_tokens` sets EOS, pad and further tokens, `ids` makes token ids of a text.
`templates` finds its chat template and the stop strings declared there, `rendering` makes text of
conversations and finds where answers begin and end, `stop_strings` ends sampled responses and makes
text of them. `identity` tells whether two tokenizers are the same.
"""

from rlhf.tokenizer.identity import hash_rendering, hash_template, hash_tokenizer
from rlhf.tokenizer.ids import first_token_ids, next_token_ids, token_ids, with_eos
from rlhf.tokenizer.load import load_tokenizer, read_tokenizer
from rlhf.tokenizer.rendering import (
    Frame,
    Message,
    RefusedConversation,
    RewrittenPrompt,
    answer_frame,
    has_end,
    render_prompt,
    render_turn,
)
from rlhf.tokenizer.special_tokens import forbidden_token_ids, num_tokens
from rlhf.tokenizer.stop_strings import StopStrings, end_token_ids, response_text
from rlhf.tokenizer.templates import chat_template_text, declare_stop_strings, stop_strings
