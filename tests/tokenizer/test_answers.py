"""Where an answer begins and ends, whatever a chat template writes around it: what is trained, what
samples end with, what scorers are given, and what servers see.

Run: python -m pytest tests/tokenizer/test_answers.py
"""

from __future__ import annotations

import json
import re

import pytest
from helpers.rows import CONVERSATIONS, assistant, user
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer, runs_of_labels
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.chat import Chat, ChatOptions
from rlhf.config import CONF_DIR, DatasetConfig, InputError, ModelConfig, SFTStageConfig
from rlhf.data import (
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_row,
    encode_samples,
    encode_sft,
)
from rlhf.models import load_policy
from rlhf.ppo.rollout import Actors, CollectSettings, score_sampled
from rlhf.sampling import stop_token_ids
from rlhf.sft import train_sft
from rlhf.tokenizer import chat_template_text, load_tokenizer, response_text

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
EOS_AT_THE_END = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
EOS_AFTER_LAST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' and loop.last"
    " %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
)
SPACE_AFTER_HEADER = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
)
NEWLINE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Qwen3's: the last answer has thoughts, empty ones where it has none; earlier ones have none
THINKING = (
    HEAD
    + "{% set parts = m.content.split('</think>') %}"
    + "{% if m.role == 'assistant' and loop.last %}<think>\n{% if parts | length > 1 %}"
    + "{{ parts[0].split('<think>')[1] | trim }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    + "{{ parts[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
# As Mistral's: the system message is in front of the last question
SYSTEM_MOVES = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = loop.index %}{% endfor %}{% set n = namespace(i=0) %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{% set n.i = n.i + 1 %}[INST] {% if n.i == ns.last %}{{ system }}\n{% endif %}{{ m.content }}"
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As DeepSeek's: the generation prompt opens the thoughts, which no turn has
OPENS_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "eos_at_the_end": EOS_AT_THE_END,
    "eos_after_last": EOS_AFTER_LAST,
    "no_generation_prompt": NO_GENERATION_PROMPT,
    "space_after_header": SPACE_AFTER_HEADER,
    "newline": NEWLINE,
    "thinking": THINKING,
    "system_moves": SYSTEM_MOVES,
}
FILES = sorted(file.stem for file in (CONF_DIR / "chat_template").glob("*.jinja"))
# The two tokens: special, ordinary additions to the vocabulary, or text like any other
MARKS = ("special", "added", "text")
SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [
    user("Name a fruit."),
    assistant("An apple."),
    user("Why?"),
    assistant("It is\nsweet."),
    user("Sure?"),
    assistant("Yes."),
]


def marked(template, marks="special"):
    """Tiny tokenizer with a chat template, to which <|im_start|> and <|im_end|> are `marks`."""
    tokenizer, tokens = tiny_tokenizer(), ["<|im_start|>", "<|im_end|>"]
    if marks == "special":
        tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    elif marks == "added":
        tokenizer.add_tokens(tokens)
    tokenizer.chat_template = chat_template_text(TEMPLATES.get(template, template))
    return tokenizer


def sentencepiece():
    """As Llama's: a space before a text becomes part of its first token; <s> and </s> are EOS and
    BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    texts = [m["content"] for c in [*CONVERSATIONS.values(), DIALOGUE] for m in c]
    texts += [(CONF_DIR / "chat_template" / f"{name}.jinja").read_text() for name in FILES]
    special = ["<unk>", "<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    return tokenizer


def rows(path, number=12, **row):
    row = row or {"messages": DIALOGUE[:4]}
    path.write_text(
        "".join(json.dumps(row).replace("fruit", f"fruit {i}") + "\n" for i in range(number))
    )
    return str(path)


# --- What is said -------------------------------------------------------------------------------

SAID = ("4", " leading and trailing  ", "two\n\nlines\n", "")


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_for_scorers_is_what_was_said(template, marks):
    tokenizer = marked(template, marks)
    for said in SAID[:3]:
        for context in (DIALOGUE[:1], DIALOGUE[:3]):
            ids = encode_response(context, said, tokenizer)
            assert response_text(ids, tokenizer, context) == said
            assert encode_response(context, response_text(ids, tokenizer), tokenizer) == ids


@pytest.mark.parametrize("tokenizer_name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize("template", FILES)
def test_text_for_scorers_has_nothing_of_our_own_templates(template, tokenizer_name):
    tokenizer = get_tokenizer(tokenizer_name, template)
    for said in ("Yo", "It is\nsweet.", "a  b\n\nc"):
        ids = encode_response([user("Hi")], said, tokenizer)
        assert response_text(ids, tokenizer, [user("Hi")]) == said


def test_answer_to_a_text_prompt_keeps_its_leading_space():
    tokenizer = get_tokenizer("byte", "vicuna_v1")
    ids = encode_response("TL;DR:", " A fruit.", tokenizer)
    assert response_text(ids, tokenizer, "TL;DR:") == " A fruit."
    assert response_text(ids, tokenizer, [user("Hi")]) == "A fruit."


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_python_scorer_of_ppo_is_given_what_was_said(template):
    tokenizer, given = marked(template, "added"), []

    def scorer(prompts, responses):
        given.extend(responses)
        return [float(response == "4") for response in responses]

    contexts = [DIALOGUE[:1], DIALOGUE[:3], "2+2="]
    prompts = [{"prompt": c, "input_ids": encode_prompt(c, tokenizer)} for c in contexts]
    said = ["4", "4", " 4"]  # the space is the answer's own after text
    sampled = [encode_response(c, s, tokenizer) for c, s in zip(contexts, said, strict=True)]
    actors = Actors(None, None, None, scorer, tokenizer, "")
    settings = CollectSettings(None, None, 1, 1)
    scores = score_sampled(actors, prompts, sampled, [True] * 3, settings)
    assert given == said and scores.total.tolist() == [1.0, 1.0, 0.0]


# --- What ends an answer ------------------------------------------------------------------------


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
@pytest.mark.parametrize("template", [*TEMPLATES, *FILES])
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


def sft_config(folder, template, marks="special", row=None, **model):
    tokenizer = marked(template, marks)
    tokenizer.save_pretrained(folder / "base")
    tiny_model("llama", tokenizer, max_position_embeddings=512).save_pretrained(folder / "base")
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(folder / "base"), **model),
        dataset=DatasetConfig(
            rows(folder / "rows.jsonl", **(row or {})), max_length=300, eval_fraction=0.3
        ),
        num_samples=1,
        response_length=4,
    )
    if row:
        config.dataset.format = "prompt_completion"
    config.trainer |= {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    return config


def test_sft_makes_the_turns_end_the_eos_of_all_that_it_saves(tmp_path, capsys):
    result = train_sft(sft_config(tmp_path, "chatml"))
    said = "EOS is <|im_end|>, with which the chat template ends every answer, in place of <eos>"
    assert said in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    model = AutoModelForCausalLM.from_pretrained(result.directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
    assert json.loads((result.directory / "rlhf.json").read_text())["eos_token_id"] == end
    assert stop_token_ids(model, tokenizer) == (end,)


def test_sft_on_text_keeps_the_eos_that_the_model_knows(tmp_path, capsys):
    config = sft_config(tmp_path, "chatml", row={"prompt": "a fruit", "completion": " apple"})
    result = train_sft(config)
    assert AutoTokenizer.from_pretrained(result.directory).eos_token == "<eos>"
    assert "EOS is" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "marks, model, warning",
    [
        (
            "text",
            {},
            "the chat template ends every answer with '<|im_end|>', which is no token of its own; "
            "EOS (<eos>) follows after the last answer of a row. Make it the EOS: "
            "model.special_tokens=['<|im_end|>'] model.eos_token='<|im_end|>'",
        ),
        (
            "special",
            {"eos_token": "<bos>"},
            "model.eos_token='<bos>', but the chat template ends every answer with '<|im_end|>', "
            "which is trained as its end; set model.eos_token=null",
        ),
    ],
)
def test_sft_warns_of_an_end_that_is_not_eos_with_the_remedy(
    tmp_path, capsys, marks, model, warning
):
    from rlhf.sft import stage as trainer

    config = sft_config(tmp_path, "chatml", marks, **model)
    tokenizer = trainer._load_tokenizer(config.model, "conversation")
    assert warning in capsys.readouterr().err
    assert tokenizer.eos_token == model.get("eos_token", "<eos>")
    remedy = ModelConfig(config.model.path, special_tokens=["<|im_end|>"], eos_token="<|im_end|>")
    assert trainer._load_tokenizer(remedy, "conversation").eos_token == "<|im_end|>"
    assert capsys.readouterr().err == ""


# --- Where an answer begins ---------------------------------------------------------------------


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


# --- Earlier turns that are rendered differently ------------------------------------------------


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
    "template", [*sorted(set(TEMPLATES) - {"thinking", "system_moves"}), *FILES]
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


def test_sft_trains_on_rewritten_conversations_and_says_how_many_sequences(tmp_path, capsys):
    config = sft_config(tmp_path, "thinking")
    config.dataset.split_long = True
    train_sft(config)
    printed = capsys.readouterr().out
    said = re.search(r"(\d+) training rows are (\d+) sequences, as the chat template", printed)
    assert said and int(said[2]) == 2 * int(said[1]) > 0
    rows = [{"messages": DIALOGUE}] * 3
    tokenizer = marked("thinking")
    lengths = [len(ids) for ids, _ in encode_samples(rows[0], tokenizer)]
    encoded, dropped = encode_sft(rows, tokenizer, lengths[1])
    assert len(encoded) == 6 and sum(dropped.values()) == 3


# --- Named templates ----------------------------------------------------------------------------


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


# --- Token ids of later turns -------------------------------------------------------------------


@pytest.mark.parametrize("template", [*FILES, "no_generation_prompt"])
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


# --- rlhf.chat ----------------------------------------------------------------------------------


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
