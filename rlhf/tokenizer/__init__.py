"""All knowledge about a tokenizer. Importing this room does not import torch.

`special_tokens` loads it, `ids` makes token ids of a text, `chat_templates` finds its template and
the stop strings declared there, `rendering` makes text of conversations and of sampled responses.
"""

from rlhf.tokenizer.chat_templates import (
    chat_template_text,
    declare_stop_strings,
    named_templates,
    stop_strings,
)
from rlhf.tokenizer.ids import (
    first_token_ids,
    forbidden_token_ids,
    hash_rendering,
    hash_template,
    hash_tokenizer,
    next_token_ids,
    num_tokens,
    token_ids,
    with_eos,
)
from rlhf.tokenizer.rendering import (
    Frame,
    Message,
    RefusedConversation,
    RewrittenPrompt,
    StopStrings,
    answer_frame,
    end_token_ids,
    has_end,
    render_prompt,
    render_turn,
    response_text,
)
from rlhf.tokenizer.special_tokens import load_tokenizer, pad_with_no_stop_id, read_tokenizer
