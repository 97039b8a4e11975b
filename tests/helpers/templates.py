"""Chat templates of many kinds, and tokenizers that use them."""

from __future__ import annotations

from helpers.rows import CONVERSATIONS, assistant, user
from helpers.tiny import tiny_tokenizer

from rlhf.config import CONF_DIR
from rlhf.tokenizer import chat_template_text

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
EOS_AT_THE_END = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
EOS_AFTER_LAST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' and loop.last"
    " %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
)
SPACE_AFTER_HEADER = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
)
NEWLINE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Qwen3's: the last answer has thoughts, empty ones where it has none; earlier ones have none
THINKING = (
    HEAD
    + "{% set parts = m.content.split('</think>') %}"
    + "{% if m.role == 'assistant' and loop.last %}<think>\n{% if parts | length > 1 %}"
    + "{{ parts[0].split('<think>')[1] | trim }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    + "{{ parts[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
# As Mistral's: the system message is in front of the last question
SYSTEM_MOVES = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = loop.index %}{% endfor %}{% set n = namespace(i=0) %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{% set n.i = n.i + 1 %}[INST] {% if n.i == ns.last %}{{ system }}\n{% endif %}{{ m.content }}"
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As DeepSeek's: the generation prompt opens the thoughts, which no turn has
OPENS_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "eos_at_the_end": EOS_AT_THE_END,
    "eos_after_last": EOS_AFTER_LAST,
    "no_generation_prompt": NO_GENERATION_PROMPT,
    "space_after_header": SPACE_AFTER_HEADER,
    "newline": NEWLINE,
    "thinking": THINKING,
    "system_moves": SYSTEM_MOVES,
}
OWN_TEMPLATES = sorted(file.stem for file in (CONF_DIR / "chat_template").glob("*.jinja"))
# The two tokens: special, ordinary additions to the vocabulary, or text like any other
MARKS = ("special", "added", "text")
SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [
    user("Name a fruit."),
    assistant("An apple."),
    user("Why?"),
    assistant("It is\nsweet."),
    user("Sure?"),
    assistant("Yes."),
]


def marked(template, marks="special"):
    """Tiny tokenizer with a chat template, to which <|im_start|> and <|im_end|> are `marks`."""
    tokenizer, tokens = tiny_tokenizer(), ["<|im_start|>", "<|im_end|>"]
    if marks == "special":
        tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    elif marks == "added":
        tokenizer.add_tokens(tokens)
    tokenizer.chat_template = chat_template_text(TEMPLATES.get(template, template))
    return tokenizer


def sentencepiece():
    """As Llama's: a space before a text becomes part of its first token; <s> and </s> are EOS and
    BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    texts = [m["content"] for c in [*CONVERSATIONS.values(), DIALOGUE] for m in c]
    texts += [(CONF_DIR / "chat_template" / f"{name}.jinja").read_text() for name in OWN_TEMPLATES]
    special = ["<unk>", "<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    return tokenizer
