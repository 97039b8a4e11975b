"""rlhf.chat on tiny models: what is streamed, what ends it, the conversation.

The command and the terminal are in test_chat_command.py.

Run: python -m pytest tests/commands/test_chat.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.chat_models import (
    EOS,
    PLAIN,
    TOKENIZER,
    answer_of,
    chat_with,
    random_policy,
    scripted,
    write,
)
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import ModelConfig
from rlhf.data import encode_prompt
from rlhf.models import load_policy
from rlhf.sampling import generate, sampling_for, stream, uniform_noise
from rlhf.tokenizer import declare_stop_strings, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write(tmp_path_factory.mktemp("runs") / "random" / "sft" / "final", random_policy())


# --- What is streamed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": 0.5, "seed": 7}, {"top_p": 0.8, "top_k": 40}, {"temperature": 0.0}],
)
def test_streamed_text_is_that_of_generate(policy, knobs):
    chat = chat_with(policy, response_length=20, **knobs)
    tokenizer = load_tokenizer(ModelConfig(path=str(policy)))
    model = load_policy(ModelConfig(path=str(policy)), tokenizer)
    ends = set()
    for number in range(8):
        question = "Name a fruit " * number
        chat.reset()
        text = answer_of(chat, question, number)
        prompt = encode_prompt([{"role": "user", "content": question}], tokenizer)
        budget = min(20, 128 - len(prompt))
        temperature = knobs.get("temperature", 1.0)
        noise = uniform_noise((knobs.get("seed", 1), number), [0], budget) if temperature else None
        sampling = sampling_for(
            model,
            tokenizer,
            budget,
            temperature or 1.0,
            knobs.get("top_p", 1.0),
            knobs.get("top_k", 0),
        )
        whole = generate(model, [prompt], sampling, noise)
        assert text == tokenizer.decode(whole.ids[0], skip_special_tokens=True)
        assert chat.cut_off == (not whole.finished[0])
        ends.add(chat.cut_off)
    assert ends == {True, False} or not knobs.get("temperature", 1)


def test_stream_yields_the_tokens_of_generate_and_leaves_training_mode_as_it_was():
    model = tiny_model("llama", TOKENIZER, attention_dropout=0.5).train()
    sampling = sampling_for(model, TOKENIZER, 20, 1.0)
    noise = uniform_noise((1,), [0], 20)
    recorded = []
    model.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    tokens = stream(model, [40, 41, 42], sampling, noise)
    first = next(tokens)
    assert not model.training and torch.is_grad_enabled()
    assert [[first, *tokens]] == generate(model, [[40, 41, 42]], sampling, noise).ids
    assert all(module.training for module in model.modules())
    assert not any(recorded)
    given_up = stream(model, [40, 41, 42], sampling, noise)
    next(given_up)
    given_up.close()
    assert all(module.training for module in model.modules())


def test_characters_of_several_tokens_are_streamed_whole(tmp_path):
    text = "hé 🙂!"
    assert len(TOKENIZER(text)["input_ids"]) > len(text)
    chat = chat_with(write(tmp_path / "final", scripted(text + EOS)), temperature=0)
    assert list(filter(None, chat.ask("Hi", 0))) == list(text)
    assert not chat.cut_off


def test_character_that_stays_incomplete_comes_at_the_end(tmp_path):
    path = write(tmp_path / "final", scripted("a🙂"))
    chat = chat_with(path, temperature=0, response_length=3)
    assert list(chat.ask("Hi", 0)) == ["a", "\ufffd"]
    assert chat.cut_off


@pytest.mark.parametrize(
    "said, stops, pieces, cut_off",
    [
        # the space and "x", "xy" are held back: they may come before, or begin, a stop string
        ("ab xyz", ["xyz"], ["a", "b"], False),
        ("ab xyc" + EOS, ["xyz"], ["a", "b", " xyc"], False),
        ("ab xy" + EOS, ["xyz"], ["a", "b", " xy"], False),
        ("ab \t" + EOS, ["xyz"], ["a", "b"], False),
        ("abcde", ["cdf", "de"], ["a", "b", "c"], False),  # "cd" was the beginning of another one
        ("aé🙂b", ["🙂"], ["a", "é"], False),
        ("abc d", ["never"], ["a", "b", "c", " d", "a", "b"], True),
    ],
)
def test_no_part_of_a_stop_string_is_streamed(tmp_path, said, stops, pieces, cut_off):
    path = write(tmp_path / "final", scripted(said))
    template = declare_stop_strings(PLAIN, stops)
    chat = chat_with(path, temperature=0, chat_template=template, response_length=7)
    shown = list(filter(None, chat.ask("Hi", 0)))
    assert (shown, chat.cut_off) == (pieces, cut_off)
    assert chat.rounds == [("Hi", "".join(pieces))]


def test_every_stop_token_of_the_generation_config_ends_an_answer(tmp_path):
    model = scripted("abc")
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *TOKENIZER("b")["input_ids"]]
    chat = chat_with(write(tmp_path / "final", model), temperature=0)
    assert answer_of(chat, "Hi") == "ab"
    assert not chat.cut_off


def test_sampling_of_the_generation_config_applies_unless_options_say_otherwise(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    for name, value in (given | {"repetition_penalty": 1.1}).items():
        setattr(model.generation_config, name, value)
    path = write(tmp_path / "final", model)
    chat = chat_with(path, top_k=0)
    assert (chat.temperature, chat.sampling.top_p, chat.sampling.top_k) == (0.6, 0.9, 0)
    assert "not applied from its generation config: repetition_penalty=1.1" in chat.describe()
    assert chat_with(path, temperature=0).temperature == 0


def test_generation_config_that_asks_for_greedy_answers_gets_them(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    model.generation_config.do_sample = False
    path = write(tmp_path / "final", model)
    assert chat_with(path).temperature == 0
    assert chat_with(path, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"top_k": -1}, (1.0, 1.0, 0)),  # vLLM's word for off
        ({"top_p": 0}, (1.0, 0, 0)),
        ({"temperature": -1.0}, (0.0, 1.0, 0)),
    ],
    ids=str,
)
def test_odd_values_of_a_generation_config_give_answers(given, expected, tmp_path):
    path = write(tmp_path / "final", random_policy())
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True} | given))
    chat = chat_with(path, response_length=2)
    assert (chat.temperature, chat.sampling.top_p, chat.sampling.top_k) == expected
    answer_of(chat, "Hi")


# --- The conversation -----------------------------------------------------------------------------


def test_later_questions_follow_the_rounds_before(policy):
    chat = chat_with(policy, response_length=6, system="Be brief.")
    first = answer_of(chat, "Name a fruit.", 0)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Another."},
    ]
    assert chat.prompt("Another.")[0] == encode_prompt(asked, chat.tokenizer)
    answer_of(chat, "Another.", 1)
    chat.undo()
    assert chat.rounds == [("Name a fruit.", first)]
    chat.reset()
    chat.undo()
    assert chat.prompt("Another.")[0] == encode_prompt([asked[0], asked[3]], chat.tokenizer)


def test_oldest_rounds_are_left_out_when_the_context_is_full(tmp_path, capsys):
    path = write(tmp_path / "final", scripted("abcdefghij"))  # 128 tokens of context
    chat = chat_with(path, temperature=0, response_length=30)
    for number in range(6):
        assert len(answer_of(chat, f"Q{number}", number)) == 30
    messages = [{"role": "user", "content": "Q5"}]
    prompt, room = chat.prompt("Q6")
    assert 30 <= room == 128 - len(prompt)
    assert chat.rounds[-1][0] == "Q5" and 0 < len(chat.rounds) < 6
    for asked, answered in reversed(chat.rounds):
        messages[:0] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    messages[-1] = {"role": "user", "content": "Q6"}
    assert prompt == encode_prompt(messages, chat.tokenizer)
    assert capsys.readouterr().err == (
        "[the context of 128 tokens is full: the oldest rounds are left out]\n"
    )


def test_budget_beyond_the_context_leaves_half_of_it_to_the_conversation(tmp_path):
    chat = chat_with(write(tmp_path / "final", scripted("abcdefghij" + EOS)), temperature=0)
    assert chat.sampling.max_new_tokens == 256
    assert answer_of(chat, "Hi") == "abcdefghij"
    answer_of(chat, "Hi")
    assert len(chat.rounds) == 2


def test_question_longer_than_the_context_is_refused_and_nothing_else_happens(policy, capsys):
    chat = chat_with(policy, response_length=5)
    answer_of(chat, "Hi")
    before = list(chat.rounds)
    assert answer_of(chat, "long " * 100) == ""
    assert chat.rounds == before != []
    tokens = len(encode_prompt([{"role": "user", "content": "long " * 100}], chat.tokenizer))
    error = f"[not answered: the question has {tokens} tokens, but the model's context has 128]\n"
    assert capsys.readouterr().err == error


def test_answer_that_is_given_up_keeps_what_was_said(tmp_path):
    chat = chat_with(write(tmp_path / "final", scripted("abcdefghij")), temperature=0)
    pieces = chat.ask("Hi", 0)
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()
    assert chat.rounds == [("Hi", "ab")]


def test_template_that_rewrites_earlier_turns_serves_a_model_of_no_stage(tmp_path):
    """As Qwen3's, which drops the thoughts of all answers but the last."""
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    chat = chat_with(tmp_path, response_length=3)
    first = answer_of(chat, "a")
    text = f"user:a{EOS}assistant:{first}{EOS}user:b{EOS}assistant:"
    assert chat.prompt("b")[0] == tokenizer(text)["input_ids"]


def test_without_chat_template_or_trained_on_text_lines_are_continued(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    tiny_model("llama", TOKENIZER).save_pretrained(tmp_path / "bare")
    write(tmp_path / "text", tiny_model("llama", TOKENIZER), prompts="text")
    for name, why in (
        ("bare", "it has no chat template"),
        ("text", "it was trained on text prompts"),
    ):
        chat = chat_with(tmp_path / name, response_length=4)
        assert answer_of(chat, "An apple is") != ""
        assert chat.prompt(" a fruit ")[0] == encode_prompt(" a fruit ", chat.tokenizer)
        assert f"{why}: it continues each line as text" in chat.describe()
        as_questions = chat_with(tmp_path / name, chat_template="alpaca")
        assert as_questions.why_text is None
        (prompt, _), start = as_questions.prompt("Hi"), "<bos>Below is an instruction"
        assert chat.tokenizer.decode(prompt).startswith(start)
