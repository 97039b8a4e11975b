"""Policies for tests of `rlhf.chat`: a scripted one, and what both test files say to them."""

from __future__ import annotations

import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.chat import Chat, ChatOptions
from rlhf.checkpoint import make_record, write_stage
from rlhf.config import StageConfig
from rlhf.tokenizer import chat_template_text

PLAIN = chat_template_text("plain")
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token


def write(directory, model, stage="sft", prompts="conversation"):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    record = make_record(stage, StageConfig(), None, tokenizer, prompts)
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return directory


def scripted(answer, **config):
    """A model that says `answer` after a prompt that ends with a newline, as those of `plain` do.

    Each token has a one-hot embedding, the layers add nothing, and the head maps a token to the
    one that follows it in the answer; after its last token comes the first one again.
    """
    width = len(TOKENIZER)
    model = tiny_model(
        "llama", TOKENIZER, hidden_size=width, num_hidden_layers=1, **{"head_dim": 80} | config
    )
    newline, *ids = TOKENIZER("\n" + answer)["input_ids"]
    assert len({newline, *ids}) == 1 + len(ids), "every token has one that follows it"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(width))
        for before, after in zip([newline, *ids], [*ids, ids[0]], strict=True):
            model.get_output_embeddings().weight[after, before] = 10.0
    return model


def random_policy():
    """A random policy: it emits any bytes, and ends now and then."""
    model = tiny_model("llama", TOKENIZER)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(10, 320, 40)]
    return model


def chat_with(path, **options):
    return Chat(ChatOptions(path=str(path), **options))


def answer_of(chat, question, number=0):
    return "".join(chat.ask(question, number))
