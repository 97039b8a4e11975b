"""What is typed or piped to rlhf.chat and is not whole text.

Run: python -m pytest tests/commands/test_chat_input.py
"""

import io

from helpers.chat_models import TOKENIZER, write
from helpers.tiny import tiny_model

import rlhf.chat
from rlhf.chat import ChatOptions, talk
from rlhf.option_parser import run_command


def test_bytes_and_halves_of_characters_that_are_no_text_are_answered(tmp_path, monkeypatch, capfd):
    write(tmp_path / "model", tiny_model("llama", TOKENIZER))
    asked = []
    encode = rlhf.chat.Chat.encode
    monkeypatch.setattr(
        rlhf.chat.Chat, "encode", lambda self, q, r: asked.append(q) or encode(self, q, r)
    )
    lines = io.BytesIO(b"a caf\xe9\n\xed\xa0\xbd\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    options = [f"path={tmp_path / 'model'}", "response_length=4", "system=be brief\udce9"]
    assert run_command("", ChatOptions, talk, options) == 0
    assert asked == ["a caf\ufffd", "\ufffd\ufffd\ufffd"]
    chat = rlhf.chat.Chat(ChatOptions(path=str(tmp_path / "model"), response_length=4))
    assert "".join(chat.ask("half \ud83c", 0)) is not None and asked[-1] == "half \ufffd"
    assert "Traceback" not in capfd.readouterr().err
