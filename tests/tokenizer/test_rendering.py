"""Where an answer begins and ends in a rendered conversation: what is trained, what ends samples,
and what servers see.
"""

from __future__ import annotations

import pytest
from helpers.rows import assistant, user
from helpers.templates import (
    CHATML,
    DIALOGUE,
    MARKS,
    OPENS_THOUGHTS,
    OWN_TEMPLATES,
    SYSTEM,
    TEMPLATES,
    marked,
    sentencepiece,
)
from helpers.tiny import tiny_model
from helpers.tokenizers import get_tokenizer, runs_of_labels

from rlhf.config import InputError, ModelConfig
from rlhf.data import (
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_row,
    encode_samples,
    encode_sft,
)
from rlhf.models import load_policy
from rlhf.sampling import stop_token_ids
from rlhf.tokenizer import chat_template_text, load_tokenizer, response_text

# --- Where an answer begins -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, header",
    [
        ("no_generation_prompt", "<|assistant|>\n"),
        ("space_after_header", "ASSISTANT:"),  # the space begins the answer's first token
    ],
)
def test_header_of_a_template_without_generation_prompt_belongs_to_the_prompt(template, header):
    tokenizer = marked(template)
    lead = " " if header == "ASSISTANT:" else ""
    for i in (1, 3, 5):
        prompt = tokenizer.decode(encode_prompt(DIALOGUE[:i], tokenizer))
        rendered = tokenizer.apply_chat_template(DIALOGUE[:i], tokenize=False)
        assert prompt == rendered + header
    stretches = runs_of_labels(*encode_row({"messages": DIALOGUE}, tokenizer))
    answers = [m["content"] for m in DIALOGUE if m["role"] == "assistant"]
    assert [tokenizer.decode(s) for s in stretches] == [f"{lead}{a}<eos>" for a in answers]


def test_template_that_insists_on_a_system_message_is_measured_too():
    insists = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer, context = marked(insists + CHATML, "added"), [SYSTEM, DIALOGUE[0]]
    ids = encode_response(context, "4", tokenizer)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response_text(ids, tokenizer, context) == "4"


def test_header_that_depends_on_the_answer_is_refused_with_the_fix():
    template = (
        "{% for m in messages %}<|{{ m.role }} {{ m.content | length }}|>\n{{ m.content }}"
        "{{ eos_token }}\n{% endfor %}"
    )
    with pytest.raises(InputError, match="writes the generation prompt before each answer") as e:
        encode_row({"messages": DIALOGUE}, marked(template))
    assert "<|assistant 5|>" in str(e.value)


def test_template_that_opens_thoughts_can_be_sampled_from_and_is_refused_for_training():
    tokenizer = marked(OPENS_THOUGHTS)
    with pytest.raises(InputError, match="renders the start of a conversation differently"):
        encode_row({"messages": DIALOGUE}, tokenizer)
    prompt = encode_prompt(DIALOGUE[:3], tokenizer)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        DIALOGUE[:3], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("error", ["{{ 'a' + 1 }}", "{{ messages[9]['role'] + 'a' }}"])
def test_template_that_fails_is_refused_in_one_line(error):
    with pytest.raises(InputError, match="the chat template refuses a conversation of user"):
        encode_prompt([user("Hi")], marked(error + "{% for m in messages %}{% endfor %}"))


# --- What ends an answer --------------------------------------------------------------------------


@pytest.mark.parametrize("marks", ["special", "added"])
@pytest.mark.parametrize("template", ["chatml", "eos_at_the_end"])
def test_token_that_ends_every_turn_ends_an_answer_by_itself(template, marks):
    tokenizer = marked(template, marks)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_response(DIALOGUE[:1], "4", tokenizer)[-1] == end
    ids, labels = encode_row({"messages": DIALOGUE}, tokenizer)
    assert [s[-1] for s in runs_of_labels(ids, labels)] == [end] * 3
    assert tokenizer.eos_token_id not in ids
    model = tiny_model("llama", tokenizer)
    assert stop_token_ids(model, tokenizer) == (tokenizer.eos_token_id, end)


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("template", [*TEMPLATES, *OWN_TEMPLATES])
def test_earlier_turns_are_what_a_server_renders(template, marks):
    tokenizer = marked(template, marks)
    for i in (1, 3, 5):
        text = tokenizer.apply_chat_template(
            DIALOGUE[:i], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(encode_prompt(DIALOGUE[:i], tokenizer)).startswith(text)
    ids, _ = encode_row({"messages": DIALOGUE}, tokenizer)
    prompt = encode_prompt(DIALOGUE[:5], tokenizer)
    assert ids == prompt + encode_response(DIALOGUE[:5], "Yes.", tokenizer)


def test_saved_generation_config_stops_where_answers_end(tmp_path):
    tokenizer = marked("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path))
    policy = load_policy(config, load_tokenizer(config))
    assert policy.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    assert policy.config.eos_token_id == tokenizer.eos_token_id


# --- Earlier turns that are rendered differently --------------------------------------------------


@pytest.mark.parametrize("template", ["thinking", "system_moves"])
def test_each_answer_is_trained_once_after_what_it_is_generated_after(template):
    tokenizer = marked(template)
    messages = [SYSTEM, *DIALOGUE]
    samples = encode_samples({"messages": messages}, tokenizer)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(samples) == len(turns) == 3
    for (ids, labels), turn in zip(samples, turns, strict=True):
        prompt = encode_prompt(messages[:turn], tokenizer)
        response = encode_response(messages[:turn], messages[turn]["content"], tokenizer)
        assert (ids, labels) == (prompt + response, [-100] * len(prompt) + response)
    assert encode_row({"messages": messages}, tokenizer) == samples[-1]
    assert encode_samples({"messages": messages}, tokenizer, True)[0][1] == samples[0][0]


def test_only_the_completion_of_rewritten_turns_is_trained():
    tokenizer = marked("thinking")
    row = {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}
    whole = encode_samples({"messages": DIALOGUE}, tokenizer)
    assert encode_samples(row, tokenizer) == whole[1:]
    row = {"prompt": DIALOGUE[:5], "completion": DIALOGUE[5:]}
    assert encode_samples(row, tokenizer) == whole[2:]


@pytest.mark.parametrize(
    "template", [*sorted(set(TEMPLATES) - {"thinking", "system_moves"}), *OWN_TEMPLATES]
)
def test_template_that_only_appends_gives_one_sequence(template):
    tokenizer = marked(template)
    [(ids, labels)] = encode_samples({"messages": DIALOGUE}, tokenizer)
    assert len(runs_of_labels(ids, labels)) == 3


def test_thoughts_of_a_row_are_trained_and_left_out_of_later_prompts():
    tokenizer = marked("thinking")
    answer = assistant("<think>\nred?\n</think>\n\nApple.")
    samples = encode_samples({"messages": [user("Hi"), answer, *DIALOGUE[2:4]]}, tokenizer)
    texts = [tokenizer.decode(ids) for ids, _ in samples]
    assert [text.count("red?") for text in texts] == [1, 0]
    said = [tokenizer.decode(s) for ids, labels in samples for s in runs_of_labels(ids, labels)]
    assert said == [
        "<think>\nred?\n</think>\n\nApple.<|im_end|>",
        "<think>\n\n</think>\n\nIt is\nsweet.<|im_end|>",
    ]


# --- Token ids of later turns ---------------------------------------------------------------------


@pytest.mark.parametrize("template", [*OWN_TEMPLATES, "no_generation_prompt"])
@pytest.mark.parametrize("tokenizer_name", ["sentencepiece", "llama"])
def test_later_turns_have_the_ids_of_the_rendered_text_as_a_whole(tokenizer_name, template):
    if tokenizer_name == "llama":
        tokenizer = get_tokenizer("llama", TEMPLATES.get(template, template))
    else:
        tokenizer = sentencepiece()
        tokenizer.chat_template = chat_template_text(TEMPLATES.get(template, template))
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, labels = encode_row({"messages": DIALOGUE}, tokenizer)
    assert ids == whole[: len(ids)]
    for i in (1, 3, 5):
        prompt = encode_prompt(DIALOGUE[:i], tokenizer)
        assert prompt == ids[: len(prompt)]
        assert ids[len(prompt)] == labels[len(prompt)] and labels[len(prompt) - 1] == -100


def test_answer_to_a_text_prompt_has_the_ids_of_the_whole_text():
    tokenizer = sentencepiece()
    prompt, answer = encode_prompt("2+2=", tokenizer), encode_response("2+2=", "4", tokenizer)
    assert prompt + answer[:-1] == tokenizer("2+2=4", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(prompt + answer[:-1]) == "2+2=4"


def test_history_that_servers_tokenise_differently_is_warned_about(capsys):
    tokenizer = marked("newline")  # "assistant: " ends with a space, which joins the answer's "a"
    messages = [user("Hi"), assistant("a fruit"), user("Hi"), assistant("a fruit")]
    encode_sft([{"messages": messages[:2]}], tokenizer, 500)
    assert capsys.readouterr().err == ""
    for encode in (encode_sft, encode_prompts):
        encode([{"messages": messages}], tokenizer, 500)
        err = capsys.readouterr().err
        assert "reaches from one turn into the next, so servers give earlier turns other" in err
    encode_sft([{"messages": messages}], marked("chatml"), 500)
    assert capsys.readouterr().err == ""
