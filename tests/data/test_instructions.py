"""Formats and chat templates of the named systems: documented rows, prompts as literals, labels.

Run: python -m pytest tests/data/test_instructions.py
"""

import json
import re
import shutil

import pytest
from helpers.rows import SHARED, assistant, real_file, user, write
from helpers.tokenizers import get_tokenizer, runs_of_labels

from rlhf.config import CONF_DIR, InputError
from rlhf.data import (
    FORMATS,
    DropRow,
    check_row,
    encode_prompt,
    encode_response,
    encode_row,
    load_rows,
)
from rlhf.tokenizer import chat_template_text, declare_stop_strings, response_text

SYSTEM = {"role": "system", "content": "Be brief."}


# --- One documented row of each source ----------------------------------------------------------

DOLLY = {
    "instruction": "When was it built?",
    "context": "The bridge[42] was built in 1902.",
    "response": "In 1902.",
    "category": "closed_qa",
}
SEED_TASK = {
    "id": "seed_task_1",
    "name": "antonym_relation",
    "instruction": "What is the relation?",
    "instances": [{"input": "Night : Day", "output": "Opposites."}],
    "is_classification": False,
}
SHAREGPT = {
    "id": "identity_0",
    "conversations": [
        {"from": "human", "value": "Who are you?"},
        {"from": "gpt", "value": "Vicuna."},
        {"from": "human", "value": "Bye!"},
        {"from": "gpt", "value": "You too!"},
    ],
}
BAIZE = {
    "topic": "How do I boil an egg?",
    "input": "The conversation between human and AI assistant.\n[|Human|] How do I boil an egg?\n"
    "[|AI|] For eight minutes.\nIn water.\n[|Human|] Thanks!\n[|AI|] Welcome.\n[|Human|] ",
}
POST = {"id": "t3_1", "subreddit": "Pets", "title": "Cat", "post": "My cat sleeps.\nAll day."}
COMPARISON = {
    "info": {**POST, "site": None, "article": None},
    "summaries": [
        {"text": " A cat.", "policy": "sup2", "note": ""},
        {"text": " Cat sleeps a lot.", "policy": "ref", "note": "ok"},
    ],
    "choice": 1,
    "worker": "x",
    "query_token": [1, 2, 3],
}
TLDR_PROMPT = "SUBREDDIT: r/Pets\n\nTITLE: Cat\n\nPOST: My cat sleeps.\nAll day.\n\nTL;DR:"
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
}


@pytest.mark.parametrize(
    "format, stage, row, canonical",
    [
        (
            "dolly15k",
            "sft",
            DOLLY,
            {
                "category": "closed_qa",
                "messages": [
                    user("When was it built?\n\nInput:\nThe bridge[42] was built in 1902."),
                    assistant("In 1902."),
                ],
            },
        ),
        (
            "dolly15k",
            "sft",
            {**DOLLY, "context": ""},
            {
                "category": "closed_qa",
                "messages": [user("When was it built?"), assistant("In 1902.")],
            },
        ),
        (
            "self_instruct",
            "sft",
            SEED_TASK,
            {
                "id": "seed_task_1",
                "name": "antonym_relation",
                "is_classification": False,
                "messages": [
                    user("What is the relation?\n\n### Input:\nNight : Day"),
                    assistant("Opposites."),
                ],
            },
        ),
        (
            "sharegpt",
            "sft",
            SHAREGPT,
            {
                "id": "identity_0",
                "messages": [
                    user("Who are you?"),
                    assistant("Vicuna."),
                    user("Bye!"),
                    assistant("You too!"),
                ],
            },
        ),
        (
            "baize",
            "sft",
            BAIZE,
            {
                "topic": "How do I boil an egg?",
                "messages": [
                    user("How do I boil an egg?"),
                    assistant("For eight minutes.\nIn water."),
                    user("Thanks!"),
                    assistant("Welcome."),
                ],
            },
        ),
        (
            "chatllama_actor",
            "sft",
            {"user_input": "Human: Hi\n\n##\n\n", "completion": "Assistant: Yo"},
            {"prompt": "Human: Hi\n\n##\n\n", "completion": "Assistant: Yo"},
        ),
        ("chatllama_rlhf", "ppo", {"user_input": "Human: Hi"}, {"prompt": "Human: Hi"}),
        (
            "tldr",
            "sft",
            {**POST, "summary": "Cat sleeps a lot."},
            {"id": "t3_1", "prompt": TLDR_PROMPT, "completion": " Cat sleeps a lot."},
        ),
        (
            "summarize_from_feedback",
            "reward",
            COMPARISON,
            {
                "prompt": TLDR_PROMPT,
                "responses": [" A cat.", " Cat sleeps a lot."],
                "ranks": [1, 0],
            },
        ),
        (
            "hh_chosen",
            "sft",
            HH,
            {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("good")]},
        ),
    ],
)
def test_documented_row_becomes_canonical(format, stage, row, canonical):
    formatted = FORMATS[format](row)
    assert formatted == canonical
    check_row(formatted, stage)


@pytest.mark.parametrize(
    "format, row, message",
    [
        ("dolly15k", {**DOLLY, "context": 3}, "field 'context': got 3"),
        ("dolly15k", {**DOLLY, "response": None}, "field 'response': missing or null"),
        ("self_instruct", {**SEED_TASK, "instances": []}, "has 0 instances; write one row"),
        (
            "self_instruct",
            {**SEED_TASK, "instances": SEED_TASK["instances"] * 2},
            "'instances': has 2 instances; write one row per instance",
        ),
        (
            "self_instruct",
            {**SEED_TASK, "instances": [{"input": "a", "output": None}]},
            r"'instances\[0\].output': missing or null",
        ),
        ("sharegpt", {"conversations": ["Hi"]}, r"'conversations\[0\]': got 'Hi'; expected {from"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": 3}]},
            r"'conversations\[0\].value': got 3; expected text",
        ),
        ("baize", {"input": "[|Human|]"[:8]}, r"field 'input': got .* with \[\|Human\|\]"),
        ("chatllama_actor", {"user_input": "a"}, "field 'completion': missing"),
        ("tldr", {**POST, "title": 3, "summary": "s"}, "field 'title': got 3"),
    ],
)
def test_malformed_row_stops_with_file_row_and_field(tmp_path, format, row, message):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=f"rows.jsonl, row 1, .*{message}"):
        load_rows(path, format, "train", "sft")


def test_comparison_without_two_summaries_and_a_choice_stops():
    for change in ({"choice": 2}, {"summaries": ["a", "b"]}, {"info": "post"}):
        with pytest.raises(InputError, match=f"field '{next(iter(change))}'"):
            FORMATS["summarize_from_feedback"]({**COMPARISON, **change})
    with pytest.raises(DropRow, match="no subreddit"):
        FORMATS["summarize_from_feedback"]({**COMPARISON, "info": {"article": "News."}})


def test_an_empty_summary_is_dropped_although_answers_begin_with_a_space(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**POST, "summary": " "}, {**POST, "summary": "s"}])
    rows, dropped = load_rows(path, "tldr", "train", "sft")
    assert [row["completion"] for row in rows] == [" s"] and dropped == {"empty response": 1}


# --- Cleaning -----------------------------------------------------------------------------------


def sharegpt(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_sharegpt_keeps_a_conversation_from_its_first_question_to_its_last_answer():
    turns = [("system", "s"), ("gpt", "x"), ("human", "a"), ("human", "a"), ("chatgpt", "b")]
    row = sharegpt(*turns, ("gpt", "b"), ("user", "c"))
    kept = FORMATS["sharegpt"](row)["messages"]
    assert kept == [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    conversations = row["conversations"]
    assert FORMATS["sharegpt"]({"items": conversations[1:]})["messages"] == kept[1:]


def test_sharegpt_drops_and_counts_what_is_no_conversation(tmp_path):
    good = sharegpt(("human", "a"), ("gpt", "b"))
    rows = [
        good,
        sharegpt(),
        sharegpt(("gpt", "b")),
        sharegpt(("human", "a"), ("human", "c"), ("gpt", "b")),
        sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        sharegpt(("human", "a"), ("bing", "b")),
        sharegpt(("human", "a"), ("gpt", " ")),
    ]
    kept, dropped = load_rows(write(tmp_path / "a.jsonl", rows), "sharegpt", "train", "sft")
    assert kept == [{"messages": [user("a"), assistant("b")]}]
    assert dropped == {
        "no question with an answer": 2,
        "speakers do not alternate": 2,
        "a speaker other than human, gpt and system": 1,
        "empty turn": 1,
    }


def test_all_500_conversations_of_the_real_file_are_kept():
    rows, dropped = load_rows(
        str(real_file("sharegpt_dummy_conversation.json")), "sharegpt", "train", "sft"
    )
    assert len(rows) == 500 and not dropped
    raw = json.loads(real_file("sharegpt_dummy_conversation.json").read_text())
    assert [[m["content"] for m in row["messages"]] for row in rows] == [
        [turn["value"] for turn in row["conversations"]] for row in raw
    ]


def test_real_files_of_self_instruct_and_chatllama_load_in_full():
    tasks, dropped = load_rows(
        str(real_file("self_instruct_seed_tasks.jsonl")), "self_instruct", "train", "sft"
    )
    assert len(tasks) == 175 and not dropped
    with_input = ["\n\n### Input:\n" in row["messages"][0]["content"] for row in tasks]
    assert sum(with_input) == 125  # counted from the file, see its paper's repository
    for name, stage in (("actor", "sft"), ("rlhf", "ppo")):
        path = real_file(f"chatllama_{name}_dataset.json")
        rows, dropped = load_rows(str(path), f"chatllama_{name}", "train", stage)
        assert len(rows) == 1 and not dropped


def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies), "lang": "en"}


def test_a_tree_becomes_one_ranking_per_turn_with_ranked_answers(tmp_path):
    deeper = message(
        "prompter",
        "Why?",
        message("assistant", "So.", rank=2),
        message("assistant", "It is ripe.", rank=0),
        message("assistant", "unranked"),
    )
    root = message(
        "prompter",
        "A fruit?",
        message("assistant", "A car.", rank=1),
        message("assistant", "Apple.", deeper, message("prompter", "Thanks!"), rank=0),
    )
    alone = message("prompter", "Hi", message("assistant", "Yo", rank=0))
    path = write(tmp_path / "trees.jsonl", [{"prompt": root}, {"prompt": alone}])
    rows, dropped = load_rows(path, "oasst", "train", "reward")
    assert rows == [
        {"prompt": [user("A fruit?")], "responses": ["A car.", "Apple."], "ranks": [1, 0]},
        {
            "prompt": [user("A fruit?"), assistant("Apple."), user("Why?")],
            "responses": ["So.", "It is ripe."],
            "ranks": [1, 0],
        },
    ]
    assert dropped == {"no turn with two ranked answers": 1}
    for wrong in (message("human", "Hi"), message("prompter", 3)):
        path = write(tmp_path / "wrong.jsonl", [{"prompt": wrong}])
        with pytest.raises(InputError, match="wrong.jsonl, row 1, field '(prompt|text)': got"):
            load_rows(path, "oasst", "train", "reward")


# --- Chat templates -----------------------------------------------------------------------------

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


# --- Templates that cannot be trained with ------------------------------------------------------

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
