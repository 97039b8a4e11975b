"""Our chat templates: prompts as literals, labels, and the templates that cannot be trained with.

Run: python -m pytest tests/tokenizer/test_chat_templates.py
"""

from __future__ import annotations

import re
import shutil

import pytest
from helpers.rows import CONVERSATIONS, SHARED, assistant, real_file, user
from helpers.templates import CHATML, DIALOGUE, NEWLINE, NO_GENERATION_PROMPT
from helpers.tiny import tiny_tokenizer
from helpers.tokenizers import PLAIN_FILES, get_tokenizer, runs_of_labels
from transformers import AutoTokenizer

from rlhf.config import CONF_DIR, InputError, ModelConfig
from rlhf.data import FORMATS, encode_prompt, encode_response, encode_row, load_rows
from rlhf.tokenizer import chat_template_text, declare_stop_strings, load_tokenizer, response_text

SYSTEM = {"role": "system", "content": "Be brief."}


DOLLY = {
    "instruction": "When was it built?",
    "context": "The bridge[42] was built in 1902.",
    "response": "In 1902.",
    "category": "closed_qa",
}


BAIZE = {
    "topic": "How do I boil an egg?",
    "input": "The conversation between human and AI assistant.\n[|Human|] How do I boil an egg?\n"
    "[|AI|] For eight minutes.\nIn water.\n[|Human|] Thanks!\n[|AI|] Welcome.\n[|Human|] ",
}


# --- Prompts and labels of our templates ----------------------------------------------------------

NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
BAIZE_INTRO = "The conversation between human and AI assistant.\n"
ALPACA_ROW = {"instruction": "Translate.", "input": "Good day", "output": "Bonjour"}
TWO_TURNS = [user("Hi"), assistant("Yo"), user("Why?")]

# template, messages, the prompt after BOS; {bos} and {eos} stand for the tokenizer's
PROMPTS = [
    ("dolly", [user("Name a fruit.")], NO_INPUT + "Name a fruit.\n\n### Response:\n"),
    (
        "dolly",
        FORMATS["dolly15k"](DOLLY)["messages"][:1],
        NO_INPUT + "When was it built?\n\nInput:\nThe bridge[42] was built in 1902."
        "\n\n### Response:\n",
    ),
    (
        "dolly",
        FORMATS["alpaca"](ALPACA_ROW)["messages"][:1],
        WITH_INPUT + "Translate.\n\n### Input:\nGood day\n\n### Response:\n",
    ),
    (
        "dolly",
        TWO_TURNS,
        NO_INPUT + "Hi\n\n### Response:\nYo\n\n### End"
        "\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ),
    ("alpaca_nl", [user("Name a fruit.")], NO_INPUT + "Name a fruit.\n\n### Response:\n"),
    (
        "alpaca_nl",
        FORMATS["alpaca"](ALPACA_ROW)["messages"][:1],
        WITH_INPUT + "Translate.\n\n### Input:\nGood day\n\n### Response:\n",
    ),
    ("vicuna_v1", [user("Hi")], VICUNA + "USER: Hi ASSISTANT:"),
    ("vicuna_v1", TWO_TURNS, VICUNA + "USER: Hi ASSISTANT: Yo{eos}USER: Why? ASSISTANT:"),
    ("vicuna_v1", [SYSTEM, user("Hi")], "Be brief. USER: Hi ASSISTANT:"),
    ("baize", [user("Hi")], BAIZE_INTRO + "[|Human|] Hi\n[|AI|]"),
    ("baize", TWO_TURNS, BAIZE_INTRO + "[|Human|] Hi\n[|AI|] Yo\n[|Human|] Why?\n[|AI|]"),
    ("falcon", [user("Hi")], "User: Hi\n\nAssistant:"),
    ("baize", [SYSTEM, user("Hi"), user("a")], "Be brief.\n[|Human|] Hi\n[|Human|] a\n[|AI|]"),
    ("falcon", TWO_TURNS, "User: Hi\n\nAssistant: Yo\n\nUser: Why?\n\nAssistant:"),
    ("falcon", [SYSTEM, user("Hi"), user("a")], "Be brief.\n\nUser: Hi\n\nUser: a\n\nAssistant:"),
    ("llama2", [user(" Hi\n")], "[INST] Hi [/INST]"),
    ("llama2", TWO_TURNS, "[INST] Hi [/INST] Yo {eos}{bos}[INST] Why? [/INST]"),
    (
        "llama2",
        [SYSTEM, user("Hi "), assistant(" Yo\n"), user(" Why?")],
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo {eos}{bos}[INST] Why? [/INST]",
    ),
    ("hh", [user("Hi")], "\n\nHuman: Hi\n\nAssistant:"),
    ("hh", TWO_TURNS, "\n\nHuman: Hi\n\nAssistant: Yo{eos}\n\nHuman: Why?\n\nAssistant:"),
    ("chatllama", [user("Hi")], "Human: Hi\n\n##\n\nAssistant:"),
    (
        "chatllama",
        TWO_TURNS,
        "Human: Hi\n\n##\n\nAssistant: Yo{eos}\n\nHuman: Why?\n\n##\n\nAssistant:",
    ),
]
# What a template writes before and after an answer, inside the labels
AROUND = {
    "plain": ("", "{eos}"),
    "dolly": ("", "\n\n### End"),
    "alpaca": ("", "{eos}"),
    "alpaca_nl": ("", "{eos}"),
    "vicuna_v1": (" ", "{eos}"),
    "baize": (" ", "\n[|Human|]"),
    "falcon": (" ", "\n\nUser"),
    "hh": (" ", "{eos}"),
    "chatllama": (" ", "{eos}"),
    "llama2": (" ", " {eos}"),
}
CONVERSATION = [
    SYSTEM,
    user("Name a fruit."),
    assistant("An orange, I think."),
    user("Why?\nSay it: yes"),
    assistant("It is\n\nsweet: yes"),
    user("Sure?"),
    assistant("[42]."),
]


@pytest.mark.parametrize("tokenizer_name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize("template, messages, literal", PROMPTS)
def test_prompts_are_byte_exact(tokenizer_name, template, messages, literal):
    tokenizer = get_tokenizer(tokenizer_name, template)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token or ""
    assert prompt == bos + literal.format(eos=tokenizer.eos_token, bos=bos)
    ids = encode_prompt(messages, tokenizer)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if tokenizer_name != "llama":  # SentencePiece: a segment begins with a space of its own
        assert decoded == prompt


@pytest.mark.parametrize("tokenizer_name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize("template", AROUND)
def test_labelled_text_is_every_answer_with_what_ends_it(tokenizer_name, template):
    tokenizer = get_tokenizer(tokenizer_name, template)
    ids, labels = encode_row({"messages": CONVERSATION}, tokenizer)
    before, after = AROUND[template]
    if tokenizer_name == "llama":  # SentencePiece: "x" and " x" have the same ids
        before = ""
    answers = [m["content"] for m in CONVERSATION if m["role"] == "assistant"]
    texts = [
        tokenizer.decode(stretch, clean_up_tokenization_spaces=False)
        for stretch in runs_of_labels(ids, labels)
    ]
    after = after.format(eos=tokenizer.eos_token)
    assert texts == [before + answer + after for answer in answers]


@pytest.mark.parametrize("tokenizer_name", ["pythia", "llama"])
def test_labelled_text_of_the_real_conversations_is_every_answer_and_eos(tokenizer_name):
    tokenizer = get_tokenizer(tokenizer_name, "vicuna_v1")
    rows, _ = load_rows(
        str(real_file("sharegpt_dummy_conversation.json")), "sharegpt", "train", "sft"
    )
    before = "" if tokenizer_name == "llama" else " "
    for row in rows:
        ids, labels = encode_row(row, tokenizer)
        texts = [
            tokenizer.decode(stretch, clean_up_tokenization_spaces=False)
            for stretch in runs_of_labels(ids, labels)
        ]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert texts == [before + answer + tokenizer.eos_token for answer in answers]


@pytest.mark.parametrize("tokenizer_name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize("template", AROUND)
def test_a_sampled_answer_is_encoded_to_the_ids_it_was_sampled_with(tokenizer_name, template):
    tokenizer = get_tokenizer(tokenizer_name, template)
    ids = encode_response([user("Hi")], "It is\nsweet.", tokenizer)
    text = response_text(ids, tokenizer)
    assert encode_response([user("Hi")], text, tokenizer) == ids
    assert text.strip() == "It is\nsweet."
    longer = [[user("Hi"), assistant(said), user("a")] for said in (text, "It is\nsweet.")]
    assert encode_prompt(longer[0], tokenizer) == encode_prompt(longer[1], tokenizer)


@pytest.mark.parametrize("template", AROUND)
def test_generation_markers_cover_what_carries_loss(template):
    tokenizer = get_tokenizer("byte", template)
    encoded = tokenizer.apply_chat_template(
        CONVERSATION, return_assistant_tokens_mask=True, return_dict=True
    )
    labels = [
        token if on else -100
        for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    before, after = AROUND[template]
    answers = [m["content"] for m in CONVERSATION if m["role"] == "assistant"]
    texts = [tokenizer.decode(s) for s in runs_of_labels(encoded["input_ids"], labels)]
    assert texts == [before + answer + after.format(eos="<eos>") for answer in answers]


def test_a_whole_transcript_of_baize_is_rendered_byte_for_byte_but_for_the_last_space():
    tokenizer = get_tokenizer("byte", "baize")
    messages = FORMATS["baize"](BAIZE)["messages"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered + " " == "<bos>" + BAIZE["input"]
    ids, labels = encode_row({"messages": messages}, tokenizer, train_on_prompt=True)
    assert tokenizer.decode(ids) == rendered and labels == ids


def test_llama2_ids_are_those_of_metas_code(tmp_path):
    """llama/generation.py: each round is encoded by itself, between BOS and EOS."""
    from transformers import LlamaTokenizer

    file = SHARED / "tokenizers" / "llama_tokenizer.model"
    if not file.exists():
        pytest.skip("the real llama tokenizer is not on this machine")
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    # legacy: as Meta's SentencePiece, a space comes before what follows a special token
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path, local_files_only=True, legacy=True)
    tokenizer.chat_template = get_tokenizer("byte", "llama2").chat_template

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # strip() comes after the system message is put in: the space before "Name" stays
    rounds = ["<<SYS>>\nBe brief.\n<</SYS>>\n\n Name a fruit.", "An orange, I think."], ["b", "c d"]
    expected = []
    for question, answer in rounds:
        expected += [1, *encode(f"[INST] {question} [/INST] {answer} "), 2]
    messages = [SYSTEM, user(" Name a fruit.\n"), assistant("An orange, I think. "), user("b")]
    ids, _ = encode_row({"messages": [*messages, assistant("c d")]}, tokenizer)
    assert ids == expected
    assert ids[:4] == [1, 518, 25580, 29962]  # <s>, "_[", "INST", "]"
    assert encode_prompt(messages, tokenizer) == expected[: -len(encode(" c d ")) - 1]


def test_an_answer_that_has_a_stop_string_inside_is_trained_on_in_full():
    for template, inside in (("falcon", "Roles:\nUser and root."), ("dolly", "Say ### End, ok")):
        tokenizer = get_tokenizer("byte", template)
        row = {"messages": [user("Hi"), assistant(inside), user("Hi"), assistant("Yo")]}
        texts = [tokenizer.decode(s) for s in runs_of_labels(*encode_row(row, tokenizer))]
        before, after = AROUND[template]
        assert texts == [before + inside + after, before + "Yo" + after]
    ends_with_eos = declare_stop_strings(chat_template_text("plain"), ["User"])
    row = {"messages": [user("Hi"), assistant("A User said so.")]}
    ids, labels = encode_row(row, get_tokenizer("byte", ends_with_eos))
    assert (ids, labels) == encode_row(row, get_tokenizer("byte", "plain"))


NO_INPUT_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName a fruit.\n\n### Response:"
)
WITH_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Translate.\n\n### Input:\nGood day\n\n### Response:"
)


@pytest.mark.parametrize("name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize(
    "row, literal",
    [
        ({"instruction": "Name a fruit.", "input": "", "output": "Apple"}, NO_INPUT_PROMPT),
        (
            {"instruction": "Translate.", "input": "Good day", "output": "Bonjour"},
            WITH_INPUT_PROMPT,
        ),
    ],
)
def test_alpaca_prompts_are_byte_exact(name, row, literal):
    tokenizer = get_tokenizer(name, "alpaca")
    messages = FORMATS["alpaca"](row)["messages"]
    bos = tokenizer.bos_token or ""
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == bos + literal
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == bos + literal + row["output"] + tokenizer.eos_token


def test_plain_template_renders_as_documented():
    tokenizer = get_tokenizer("pythia")
    messages = [{"role": "system", "content": "S"}, user("A"), assistant("B"), user("C")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "S\n\n### User:\nA\n\n### Assistant:\nB<|endoftext|>\n\n### User:\nC\n\n### Assistant:\n"
    )


@pytest.mark.parametrize("template", PLAIN_FILES)
def test_generation_markers_cover_the_answer_and_its_eos(template):
    tokenizer = get_tokenizer("byte", template)
    encoded = tokenizer.apply_chat_template(
        CONVERSATIONS["three turns"], return_assistant_tokens_mask=True, return_dict=True
    )
    labels = [
        token if on else -100
        for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    texts = [tokenizer.decode(s) for s in runs_of_labels(encoded["input_ids"], labels)]
    assert texts == ["An orange, i think.<eos>", "It is\nsweet: yes<eos>", "Yes.<eos>"]


def test_chat_template_by_name_path_or_text(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template_text(str(file)) == "{{ messages }}"
    assert chat_template_text(CHATML) == CHATML
    assert "generation" in chat_template_text("plain")
    with pytest.raises(InputError, match="alpaca, .*plain.*Did you mean plain"):
        chat_template_text("plane")
    with pytest.raises(InputError, match="that exists"):
        chat_template_text(str(tmp_path / "absent.jinja"))


# --- Named templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["files", "list"])
def test_default_of_named_templates_or_the_one_chosen_is_used_and_saved(tmp_path, form):
    tokenizer = tiny_tokenizer()
    named = {"default": CHATML, "rag": NEWLINE, "tool_use": NO_GENERATION_PROMPT}
    tokenizer.chat_template = named
    ids = encode_prompt(DIALOGUE[:3], tokenizer)  # a library user's, as it is
    tokenizer.save_pretrained(tmp_path / "base", save_jinja_files=form == "files")
    assert (tmp_path / "base" / "additional_chat_templates").is_dir() == (form == "files")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template == named
    for name, text in (None, CHATML), ("rag", NEWLINE), ("plain", chat_template_text("plain")):
        loaded = load_tokenizer(ModelConfig(str(tmp_path / "base"), chat_template=name))
        assert loaded.chat_template == text
        loaded.save_pretrained(tmp_path / str(name))
        again = load_tokenizer(ModelConfig(str(tmp_path / str(name))))
        assert again.chat_template == text
        assert (encode_prompt(DIALOGUE[:3], again) == ids) == (name is None)
    config = ModelConfig(str(tmp_path / "base"), stop_strings=["\nUser"])
    assert load_tokenizer(config).chat_template.endswith(CHATML)
    with pytest.raises(InputError, match="neither one of default, rag, tool_use, .*mean rag"):
        load_tokenizer(ModelConfig(str(tmp_path / "base"), chat_template="rga"))


def test_named_templates_without_a_default_are_refused_with_their_names(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": NEWLINE, "tool_use": CHATML}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has the chat templates rag, tool_use, .*template=rag"):
        load_tokenizer(ModelConfig(str(tmp_path)))
    assert load_tokenizer(ModelConfig(str(tmp_path), chat_template="rag")).chat_template == NEWLINE


# --- Templates that cannot be trained with --------------------------------------------------------

MARKERS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@pytest.mark.parametrize("template", AROUND)
def test_labels_are_the_same_without_generation_markers(template):
    text = (CONF_DIR / "chat_template" / f"{template}.jinja").read_text()
    bare, num_markers = MARKERS.subn("{#- -#}", text)
    assert num_markers == 2
    expected = encode_row({"messages": CONVERSATION}, get_tokenizer("byte", template))
    assert encode_row({"messages": CONVERSATION}, get_tokenizer("byte", bare)) == expected


ROLES_ALONE = "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'user' %}"
ROLES_ALONE += "{{ m['content'] }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
QUESTIONS = "{% for m in messages if m['role'] == 'user' %}{{ 'Q: ' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        ROLES_ALONE,
        ROLES_ALONE + "{% if add_generation_prompt %}assistant:{% endif %}",
        QUESTIONS,
        QUESTIONS + "{% if add_generation_prompt %} A: {% endif %}",
    ],
)
def test_template_that_leaves_out_the_answers_is_refused(template):
    tokenizer = get_tokenizer("byte", template)
    messages = [user("Hi"), assistant("Yo")]
    for encode in (
        lambda: encode_row({"messages": messages}, tokenizer),
        lambda: encode_response(messages[:1], "Yo", tokenizer),
    ):
        with pytest.raises(InputError, match="leaves out what the assistant says: nothing of 'Yo'"):
            encode()


def test_conversation_that_starts_with_the_assistant_is_refused_where_turns_must_alternate():
    tokenizer = get_tokenizer("byte", "llama2")
    for messages, roles in (
        ([SYSTEM, assistant("Hi"), user("a")], "system, assistant"),
        ([user("a"), user("b")], "user, user"),
        ([user("a"), SYSTEM, user("b")], "user, system, user"),
    ):
        message = f"refuses a conversation of {roles}: user and assistant must take turns, after a"
        with pytest.raises(InputError, match=message):
            encode_prompt(messages, tokenizer)
    with pytest.raises(InputError, match="starts with the assistant; it must start with the user"):
        encode_prompt([assistant("Hi"), user("a")], tokenizer)


@pytest.mark.parametrize("template", AROUND)
def test_unknown_role_is_refused_first_and_later(template):
    tokenizer, tool = get_tokenizer("byte", template), {"role": "tool", "content": "2"}
    for messages in ([tool, user("Hi")], [user("Hi"), tool], [user("a"), assistant("b"), tool]):
        with pytest.raises(InputError, match="the chat template refuses a conversation of .*tool"):
            encode_prompt(messages, tokenizer)
