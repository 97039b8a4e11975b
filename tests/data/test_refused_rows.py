"""A chat template that refuses some conversations costs those rows, not the run."""

import json
from collections import Counter
from functools import partial

import pytest
from helpers.rows import assistant, user
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import saved
from tokenizers import AddedToken, normalizers
from transformers import AutoModelForSequenceClassification

from rlhf.config import InputError, MixConfig, ScorerConfig
from rlhf.data import (
    encode_prompt,
    encode_prompts,
    encode_ranked,
    encode_response,
    encode_row,
    encode_sft,
    encode_texts,
    not_refused,
)
from rlhf.scorers import load_scorer
from rlhf.sft.training_rows import mix_texts
from rlhf.tokenizer import answer_frame, response_text

# as Gemma's and Mistral's: no system message, and the roles alternate
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def strict():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT
    return tokenizer


def rows_of(stage, prompt):
    if stage == "reward":
        return {"prompt": prompt, "responses": ["Yo", "No"], "ranks": [0, 1]}
    return {"messages": [*prompt, assistant("Yo")]}


ENCODE = {
    "sft": lambda rows, bad: encode_sft(rows, strict(), 100, on_bad_row=bad),
    "reward": lambda rows, bad: encode_ranked(rows, strict(), 100, bad),
    "ppo": lambda rows, bad: encode_prompts(rows, strict(), None, bad),
    "ptx": lambda rows, bad: encode_texts(rows, strict(), 100, bad),
}


@pytest.mark.parametrize("stage", ENCODE)
def test_a_row_that_the_template_refuses_is_dropped_named_or_stopped_at(stage):
    good = [rows_of(stage, [user(f"Hi {i}")]) for i in range(3)]
    bad = rows_of(stage, [user("Bad one"), user("there")])
    encoded, dropped = ENCODE[stage]([good[0], bad, *good[1:]], "drop")
    assert encoded == [
        # a reward row names its index
        one | ({"row": one["row"] + (one["row"] > 0)} if stage == "reward" else {})
        if isinstance(one, dict)
        else one
        for one in ENCODE[stage](good, "drop")[0]
    ]
    assert dropped == {"refused by the chat template": 1}
    assert "'Bad one'" in next(iter(dropped)).first
    with pytest.raises(InputError, match="'Bad one'.*dataset.on_bad_row=drop"):
        ENCODE[stage]([*good, bad], "stop")
    with pytest.raises(InputError, match="'Bad one'.*2 of 4 rows are refused"):
        ENCODE[stage]([*good[:2], bad, bad], "drop")


def test_texts_that_the_template_refuses_are_not_mixed_in(tmp_path):
    talks = [[user(f"Hi {i}"), assistant("Yo")] for i in range(3)] + [
        [user("a"), user("b"), assistant("Yo")]
    ]
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    mix = MixConfig(path=str(path), format="messages", fraction=0.9)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]
    _, line = mix_texts(rows, mix, strict(), 100, seed=3)
    assert "1 refused by the chat template" in line


def test_what_is_wrong_with_all_rows_is_not_counted_by_row():
    tokenizer = tiny_tokenizer()  # without a chat template
    rows = [rows_of("sft", [user("Hi")])]
    with pytest.raises(InputError, match="has no chat template"):
        list(not_refused(rows, partial(encode_row, tokenizer=tokenizer), "drop", Counter()))


def test_prompts_of_which_the_tokenizer_leaves_nothing_are_dropped():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    encoded, dropped = encode_prompts([{"prompt": "\u200b"}, {"prompt": "Hi"}], tokenizer, None)
    assert [row["prompt"] for row in encoded] == ["Hi"]
    assert dropped == {"prompts without a token": 1}


# --- Where an answer ends -----------------------------------------------------------------------

NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_eos_in_the_middle_of_an_answer_does_not_end_it_where_the_template_writes_none():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_END
    talk = [user("Hi"), assistant("Write <eos> to end"), user("And?"), assistant("Fine")]
    ids, labels = encode_row({"messages": talk}, tokenizer)
    assert tokenizer.decode([i for i in labels if i >= 0]) == " Write <eos> to end\n Fine\n<eos>"
    assert tokenizer.decode(ids).count("to end") == 1


@pytest.mark.parametrize("answer", ["<think>hm</think>Yo", "</think>Yo"])
def test_an_answer_whose_thoughts_the_template_leaves_out_is_kept(answer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = encode_response([user("Hi")], answer, tokenizer)
    assert response_text(ids, tokenizer) == "Yo"


def test_a_sampled_answer_that_a_reward_models_template_leaves_out_is_read_as_empty(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = tiny_model("llama", tokenizer).config
    config.num_labels = 1
    saved(tmp_path / "reward", tokenizer, AutoModelForSequenceClassification.from_config(config))
    scorer = load_scorer(ScorerConfig(str(tmp_path / "reward"), "none"))
    prompt = [user("Hi")]
    assert scorer.encode_pair(prompt, "hm</think>") == scorer.encode_pair(prompt, "")
    scores = scorer([prompt] * 3, ["hm</think>", "", "Yo"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("strip", ["rstrip", "lstrip"])
def test_tokens_that_take_whitespace_give_the_ids_of_the_text_as_a_whole(strip):
    """Phi-3's tokens take the newline behind them."""
    tokenizer = tiny_tokenizer()
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokens = [AddedToken(mark, normalized=False, special=True, **{strip: True}) for mark in marks]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert answer_frame(tokenizer).end_token == "<|end|>"
    talk = [user("Hi"), assistant("Yo"), user("And?"), assistant("Fine")]
    ids, _ = encode_row({"messages": talk}, tokenizer)
    served = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert ids == served[: len(ids)]
    prompt = tokenizer.apply_chat_template(
        talk[:3], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(talk[:3], tokenizer) == prompt
