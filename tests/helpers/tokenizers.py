"""Tokenizers of five kinds with a chat template, and the stretches of ids that carry loss."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from helpers.rows import CONVERSATIONS, SHARED
from helpers.templates import CHATML
from helpers.tiny import tiny_tokenizer

from rlhf.config import CONF_DIR, ModelConfig
from rlhf.tokenizer import chat_template_text

EOS_THEN_NEWLINE = (  # what follows the EOS belongs to the next prompt; writes a BOS where it can
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PLAIN_FILES = ("plain", "alpaca")
TEMPLATES = {
    "plain": "plain",
    "alpaca": "alpaca",
    "chatml": CHATML,
    "eos_then_newline": EOS_THEN_NEWLINE,
}
# What a template writes after an answer in place of EOS; ours follows the last answer alone, as no
# server would write it into a conversation's history
TEMPLATE_EOS = {"chatml": "<|im_end|>\n"}


def word_level():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    texts = [m["content"] for c in CONVERSATIONS.values() for m in c]
    texts += [(CONF_DIR / "chat_template" / f"{name}.jinja").read_text() for name in PLAIN_FILES]
    texts += ["<|im_start|>user\n<|im_end|>system\nassistant: 2+2=4 two three"]
    words = ["<unk>", "<pad>", "<s>", "</s>"]
    for text in texts:
        words += [piece for piece, _ in pieces.pre_tokenizer.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    pieces.model = models.WordLevel(vocabulary, unk_token="<unk>")
    pieces.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def adds_bos():
    """A tokenizer that writes BOS by itself, as Llama's does when loaded from the Hub."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def pythia():
    from transformers import PreTrainedTokenizerFast

    file = SHARED / "tokenizers" / "pythia_20B_tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


def llama():
    from transformers import LlamaTokenizer

    # From a folder: LlamaTokenizer(vocab_file=...) builds an empty vocabulary (transformers 5.23).
    with tempfile.TemporaryDirectory() as folder:
        file = SHARED / "tokenizers" / "llama_tokenizer.model"
        shutil.copyfile(file, Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == 32000
    return tokenizer


TOKENIZERS = {
    "byte": tiny_tokenizer,
    "word": word_level,
    "adds_bos": adds_bos,
    "pythia": pythia,
    "llama": llama,
}
_build = cache(lambda name: TOKENIZERS[name]())


def get_tokenizer(name, template="plain"):
    if name in ("pythia", "llama") and not (SHARED / "tokenizers").is_dir():
        pytest.skip(f"the real {name} tokenizer is not on this machine")
    tokenizer = _build(name)
    tokenizer.chat_template = chat_template_text(TEMPLATES.get(template, template))
    return tokenizer


def every(name):
    values = {"tokenizer": TOKENIZERS, "template": TEMPLATES, "conversation": CONVERSATIONS}[name]
    return pytest.mark.parametrize(f"{name}_name", list(values))


def runs_of_labels(ids, labels):
    """The labelled stretches, as lists of ids; an EOS ends a stretch."""
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    stretches, inside = [], False
    for label in labels:
        if label == -100:
            inside = False
            continue
        if not inside:
            stretches.append([])
        stretches[-1].append(label)
        inside = True
    return stretches


def saved(directory, tokenizer=None, model=None, **knobs):
    """Configuration of a model directory with a tokenizer, and a model where one is given."""
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    if model is not None:
        model.save_pretrained(directory)
    return ModelConfig(path=str(directory), **knobs)
