"""The chat streams what a model says, and nothing that the chat template writes around it."""

from __future__ import annotations

import pytest
from helpers.rows import user
from helpers.templates import marked
from helpers.tiny import tiny_model

from rlhf.chat import Chat, ChatOptions
from rlhf.data import encode_response


@pytest.mark.parametrize("marks", ["added", "text"])
@pytest.mark.parametrize("template", ["chatml", "thinking"])
def test_nothing_of_the_template_is_streamed(tmp_path, monkeypatch, template, marks):
    tokenizer = marked(template, marks)
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama", tokenizer, max_position_embeddings=512).save_pretrained(tmp_path)
    chat = Chat(ChatOptions(path=str(tmp_path)))
    for said in ("Yo", "<thinker>", "a <|im_e b"):
        ids = encode_response([user("Hi")], said, tokenizer)
        monkeypatch.setattr("rlhf.sampling.stream", lambda *_, ids=ids: iter(ids))
        pieces = list(filter(None, chat.ask("Hi", 0)))
        assert "".join(pieces) == said and len(pieces) > 1
        assert chat.rounds[-1] == ("Hi", said) and not chat.cut_off
