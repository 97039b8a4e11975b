"""The token ids and labels that the three stages share."""

from __future__ import annotations

import pytest
from helpers.rows import CONVERSATIONS, user
from helpers.tiny import tiny_tokenizer
from helpers.tokenizers import TEMPLATE_EOS, every, get_tokenizer, runs_of_labels

from rlhf.config import InputError
from rlhf.data import (
    describe_dropped,
    encode_prompt,
    encode_prompts,
    encode_ranked,
    encode_response,
    encode_row,
    encode_sft,
    encode_texts,
    prompt_of,
)

# --- Rendering and labels -------------------------------------------------------------------------


@every("conversation")
@every("template")
@every("tokenizer")
def test_labelled_text_is_every_answer_and_its_eos(
    tokenizer_name, template_name, conversation_name
):
    tokenizer = get_tokenizer(tokenizer_name, template_name)
    messages = CONVERSATIONS[conversation_name]
    ids, labels = encode_row({"messages": messages}, tokenizer)
    assert tokenizer.unk_token is None or tokenizer.unk_token_id not in ids
    stretches = runs_of_labels(ids, labels)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    eos = tokenizer.eos_token_id
    num_without = len(answers) - 1 if template_name in TEMPLATE_EOS else 0
    expected = [0] * num_without + [1] * (len(answers) - num_without)
    assert [s.count(eos) for s in stretches] == [int(s[-1] == eos) for s in stretches] == expected
    said = [s[:-1] if s[-1] == eos else s for s in stretches]
    texts = [tokenizer.decode(s, clean_up_tokenization_spaces=False) for s in said]
    if tokenizer_name == "llama":  # SentencePiece: "x" and " x" have the same ids
        answers = [answer.removeprefix(" ") for answer in answers]
    assert texts == [answer + TEMPLATE_EOS.get(template_name, "") for answer in answers]


@every("template")
@every("tokenizer")
def test_ppo_prompt_has_the_ids_before_each_trained_turn(tokenizer_name, template_name):
    tokenizer = get_tokenizer(tokenizer_name, template_name)
    for messages in CONVERSATIONS.values():
        ids, labels = encode_row({"messages": messages}, tokenizer)
        starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        assert len(starts) == len(turns)
        for start, turn in zip(starts, turns, strict=True):
            assert encode_prompt(messages[:turn], tokenizer) == ids[:start]
            response = encode_response(messages[:turn], messages[turn]["content"], tokenizer)
            if template_name in TEMPLATE_EOS and turn != turns[-1]:
                response = response[:-1]
            assert response == ids[start : start + len(response)]
        assert encode_prompt(messages[:-1], tokenizer) + response == ids


@every("template")
@every("tokenizer")
def test_all_text_of_the_rendering_is_in_the_ids(tokenizer_name, template_name):
    tokenizer = get_tokenizer(tokenizer_name, template_name)
    messages = CONVERSATIONS["three turns"]
    ids, _ = encode_row({"messages": messages}, tokenizer)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    if template_name == "chatml":
        text = text.replace(tokenizer.eos_token, "")  # ours: the template writes none
    squeeze = "".join  # SentencePiece starts each segment with a space
    assert squeeze(text.split()) == squeeze(rendered.split())


@every("tokenizer")
def test_text_rows_are_prompt_completion_eos_without_a_template(tokenizer_name):
    tokenizer = get_tokenizer(tokenizer_name)
    row = {"prompt": "2+2=", "completion": "4"}
    ids, labels = encode_row(row, tokenizer)
    prompt = encode_prompt("2+2=", tokenizer)
    assert prompt == tokenizer("2+2=")["input_ids"]
    assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}
    assert labels[len(prompt) :] == ids[len(prompt) :] == encode_response("2+2=", "4", tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[len(prompt) : -1]) == "4"


def test_bos_is_not_doubled():
    tokenizer = get_tokenizer("adds_bos", "eos_then_newline")
    bos = tokenizer.bos_token_id
    for prompt in ("two", "<bos>two", [user("two")]):
        ids = encode_prompt(prompt, tokenizer)
        assert ids[0] == bos and ids.count(bos) == 1
    ids, _ = encode_row({"messages": CONVERSATIONS["three turns"]}, tokenizer)
    assert ids[0] == bos and ids.count(bos) == 1


def test_eos_at_the_end_of_a_text_completion_is_not_doubled():
    tokenizer = get_tokenizer("byte")
    ids = encode_response("a", "b<eos>", tokenizer)
    assert ids == encode_response("a", "b", tokenizer)


def test_only_the_completion_of_a_conversational_prompt_is_trained():
    tokenizer = get_tokenizer("byte")
    messages = CONVERSATIONS["three turns"]
    ids, labels = encode_row({"prompt": messages[:-1], "completion": messages[-1:]}, tokenizer)
    assert ids == encode_row({"messages": messages}, tokenizer)[0]
    assert [tokenizer.decode(s) for s in runs_of_labels(ids, labels)] == ["Yes.<eos>"]


def test_train_on_prompt_labels_every_token():
    tokenizer = get_tokenizer("byte")
    for row in ({"messages": CONVERSATIONS["three turns"]}, {"prompt": "a", "completion": "b"}):
        ids, labels = encode_row(row, tokenizer, train_on_prompt=True)
        assert labels == ids == encode_row(row, tokenizer)[0]


def test_text_after_the_last_answer_is_left_out():
    tokenizer = get_tokenizer("byte")
    messages = CONVERSATIONS["one turn"]
    row = {"messages": [*messages, user("ignored")]}
    assert encode_row(row, tokenizer) == encode_row({"messages": messages}, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = (
        "{% for m in messages %}{{ m['content'] + (messages | length | string) }}{% endfor %}"
    )
    with pytest.raises(InputError, match="renders the start of a conversation differently"):
        encode_row({"messages": CONVERSATIONS["one turn"]}, get_tokenizer("byte", rewriting))


def test_a_template_that_refuses_a_conversation_names_its_roles():
    tokenizer = get_tokenizer("byte", "alpaca")
    system = {"role": "system", "content": "x"}
    with pytest.raises(InputError, match="user, system: a system message must come first"):
        encode_prompt([user("a"), system], tokenizer)


def test_conversations_without_a_template_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="model.chat_template=plain"):
        encode_prompt([user("a")], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        encode_response("a", "b", tokenizer)


# --- All rows of a stage --------------------------------------------------------------------------


def test_encode_sft_drops_long_rows_and_counts_them():
    tokenizer = get_tokenizer("byte")
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 2, 3)]
    lengths = [len(encode_row(row, tokenizer)[0]) for row in rows]
    encoded, dropped = encode_sft(rows, tokenizer, max_length=lengths[1])
    assert [len(row["input_ids"]) for row in encoded] == lengths[:2]
    assert dropped == {f"longer than dataset.max_length={lengths[1]} tokens": 1}
    with pytest.raises(InputError, match=f"max_length=2 .* the longest has {lengths[2]} tokens"):
        encode_sft(rows, tokenizer, max_length=2)


def test_a_limit_that_drops_more_than_a_tenth_is_a_warning_with_one_that_keeps_95_percent(capsys):
    tokenizer = get_tokenizer("byte")
    rows = [{"prompt": "a", "completion": "b" * n} for n in range(1, 101)]
    lengths = [len(encode_row(row, tokenizer)[0]) for row in rows]
    for limit, room in ((lengths[89], 512), (lengths[88], None)):  # a tenth; held-out rows
        encode_sft(rows, tokenizer, limit, room=room)
    assert capsys.readouterr().err == ""
    encode_sft(rows, tokenizer, lengths[88], room=512)
    assert capsys.readouterr().err == (
        f"warning: 11 of 100 rows (11%) are longer than dataset.max_length={lengths[88]} tokens "
        f"and are dropped; dataset.max_length={lengths[94]} keeps 95% of them\n"
    )
    assert len(encode_sft(rows, tokenizer, lengths[94])[0]) == 95
    encode_sft(rows, tokenizer, lengths[49], room=lengths[49])
    assert f"at most {lengths[94]}, but the model has room for" in capsys.readouterr().err
    encode_prompts([{"prompt": "a"}, {"prompt": "a" * 9}], tokenizer, 5, room=5)
    assert ": lower ppo.response_length, or shorten" in capsys.readouterr().err


def test_a_ranked_row_is_as_long_as_the_shorter_limit_that_keeps_two_untied_responses(capsys):
    tokenizer = get_tokenizer("byte")
    row = {"prompt": "p", "responses": ["a" * 30, "b", "c", "d" * 50], "ranks": [0, 1, 1, 2]}
    encode_ranked([row, row | {"responses": ["a", "b", "c", "d"]}], tokenizer, 20, room=99)
    enough = len(encode_prompt("p", tokenizer) + encode_response("p", "a" * 30, tokenizer))
    assert f"dataset.max_length={enough} keeps 95% of them" in capsys.readouterr().err


def test_encode_prompts_drops_long_prompts():
    tokenizer = get_tokenizer("byte")
    rows = [{"prompt": "a"}, {"prompt": "xyz" * 9}, {"messages": CONVERSATIONS["one turn"]}]
    encoded, dropped = encode_prompts(rows, tokenizer, None)
    assert [one["prompt"] for one in encoded] == [prompt_of(row) for row in rows] and not dropped
    assert encoded[2]["input_ids"] == encode_prompt([user("Name a fruit.")], tokenizer)
    encoded, dropped = encode_prompts(rows, tokenizer, 1)
    assert len(encoded) == 1 and dropped == {"longer than ppo.max_prompt_length=1 tokens": 2}
    with pytest.raises(InputError, match="ppo.max_prompt_length=0 leaves no row"):
        encode_prompts(rows, tokenizer, 0)


def test_encode_ranked_loses_only_long_responses_while_two_untied_remain():
    tokenizer = get_tokenizer("byte")
    long = "z" * 50
    rows = [
        {"prompt": "p", "responses": ["a", long, "b"], "ranks": [0, 1, 2]},
        {"prompt": "p", "responses": ["a", long, "b"], "ranks": [0, 1, 0]},
        {"prompt": "p", "responses": ["q", "a"], "ranks": [1, 0]},
    ]
    encoded, dropped = encode_ranked(rows, tokenizer, max_length=20)
    assert [row["row"] for row in encoded] == [0, 2]
    assert [row["ranks"] for row in encoded] == [[0, 2], [1, 0]]
    eos, prompt = tokenizer.eos_token_id, encode_prompt("p", tokenizer)
    a, q = (tokenizer(text)["input_ids"] for text in "aq")
    assert encoded[1]["input_ids"] == [[*prompt, *q, eos], [*prompt, *a, eos]]
    assert encoded[1]["lengths"] == [len(q) + 1, len(a) + 1]
    assert describe_dropped(dropped) == (
        "dropped 1 rows: 1 longer than dataset.max_length=20 tokens; "
        "1 single responses longer than dataset.max_length=20 tokens"
    )
    with pytest.raises(InputError, match="dataset.max_length=2 leaves no row; raise it"):
        encode_ranked(rows, tokenizer, max_length=2)


def test_responses_that_the_template_makes_equal_are_no_preference():
    tokenizer = get_tokenizer("byte")
    trims = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = trims + "{% if add_generation_prompt %}assistant:{% endif %}"
    prompt = [user("Hi")]
    rows = [
        {"prompt": prompt, "responses": ["Yes", "Yes "], "ranks": [0, 1]},
        {"prompt": prompt, "responses": ["Yes", "No", "Yes "], "ranks": [0, 1, 0]},
    ]
    encoded, dropped = encode_ranked(rows, tokenizer, max_length=50)
    assert [row["row"] for row in encoded] == [1]
    assert dropped == {"responses that the chat template makes equal, ranked differently": 1}


def test_texts_are_encoded_whole_cut_and_never_too_short_to_predict():
    tokenizer = get_tokenizer("byte")
    rows = [
        {"text": "ab"},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    (text, pair, conversation), _ = encode_texts(rows, tokenizer, 100)
    assert text == tokenizer("ab", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert pair == encode_row(rows[1], tokenizer)[0]
    assert conversation == encode_row(rows[2], tokenizer)[0]
    assert encode_texts(rows[:1], tokenizer, 2)[0] == [text[:2]]
    with pytest.raises(InputError, match="ptx.max_length=1 leaves no row"):
        encode_texts(rows[:1], tokenizer, 1)
