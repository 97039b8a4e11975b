"""Stop strings that a chat template declares, and the text of a sampled response."""

from __future__ import annotations

import pytest
from helpers.rows import assistant, user
from helpers.templates import DIALOGUE, MARKS, OWN_TEMPLATES, TEMPLATES, marked
from helpers.tensors import exact
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer, saved
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import CONF_DIR, InputError, ModelConfig, ScorerConfig, StageConfig
from rlhf.data import encode_prompt, encode_response
from rlhf.models import init_reward_model, load_policy
from rlhf.ppo.actors import Actors
from rlhf.ppo.scoring import score_sampled
from rlhf.sampling import sampling_for
from rlhf.scorers import RewardModelScorer, score_sequences
from rlhf.tokenizer import (
    chat_template_text,
    declare_stop_strings,
    load_tokenizer,
    response_text,
    stop_strings,
)

VOCAB, EOS = 320, 2
DOLLY_TOKENS = ["### End", "### Instruction:", "### Response:\n"]
DOLLY = {"special_tokens": DOLLY_TOKENS, "eos_token": "### End", "chat_template": "dolly"}


# --- Stop strings of a template -------------------------------------------------------------------


class WithTemplate:
    """What `stop_strings` looks at."""

    def __init__(self, chat_template):
        self.chat_template = chat_template


def test_three_templates_declare_stop_strings():
    names = [file.stem for file in (CONF_DIR / "chat_template").glob("*.jinja")]
    assert len(names) >= 10
    found = {name: stop_strings(WithTemplate(chat_template_text(name))) for name in names}
    assert {name: stops for name, stops in found.items() if stops} == {
        "baize": ("[|Human|]",),
        "falcon": ("\nUser",),
        "dolly": ("### End",),
    }
    assert stop_strings(WithTemplate(None)) == ()


AWKWARD = ["\nUser", "it's", 'a "b"', "100%} -%}", "]", "\\n", "é🙂", "{# no #}"]


@pytest.mark.parametrize(
    "start", ["", "\n\nHuman", "{#- a comment -#}\n", "  {%- if true %}x{% endif %}"]
)
def test_declared_stop_strings_are_read_back_and_render_nothing(start):
    template = start + "{% for m in messages %}{{ m }}{% endfor %}"
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    declared = declare_stop_strings(template, AWKWARD)
    assert stop_strings(WithTemplate(declared)) == tuple(AWKWARD)
    rendered = environment.from_string(declared + "{{ stop_strings | join('|') }}").render(
        messages="ab"
    )
    plain = environment.from_string(template).render(messages="ab")
    assert rendered == plain + "|".join(AWKWARD)  # Jinja reads the same strings
    replaced = declare_stop_strings(declared, ["x"])
    assert stop_strings(WithTemplate(replaced)) == ("x",)
    assert len(replaced.splitlines()) == len(declared.splitlines())
    for none in (declare_stop_strings(declared, []), declare_stop_strings(template, [])):
        assert stop_strings(WithTemplate(none)) == ()
        assert environment.from_string(none).render(messages="ab") == plain
    assert declare_stop_strings(template, []) == template


def test_stop_strings_of_a_stage_travel_with_its_tokenizer(tmp_path):
    config = saved(tmp_path, chat_template="falcon", stop_strings=["\nUser", "<end>"])
    load_tokenizer(config).save_pretrained(tmp_path / "final")
    for later in (
        AutoTokenizer.from_pretrained(tmp_path / "final"),
        load_tokenizer(ModelConfig(str(tmp_path / "final"))),
    ):
        assert stop_strings(later) == ("\nUser", "<end>")
        with_default = get_tokenizer("byte", "falcon")
        messages = [user("Hi"), assistant("Yo"), user("a")]
        assert encode_prompt(messages, later) == encode_prompt(messages, with_default)


@pytest.mark.parametrize(
    "value", ["'\\nUser'", "['a', 3]", "['a', '']", "[unquoted]", "['a'", "('a',)", "messages"]
)
def test_malformed_declaration_is_refused_when_the_tokenizer_loads(tmp_path, value):
    template = f"{{%- set stop_strings = {value} -%}}" + chat_template_text("plain")
    with pytest.raises(InputError, match=r"declares stop_strings = .*expected a list of strings"):
        load_tokenizer(saved(tmp_path, chat_template=template))


def test_declaration_in_a_comment_or_of_another_name_is_none():
    text = "{# {% set stop_strings = ['a'] %} #}{% set my_stop_strings = ['b'] %}{{ stop_strings }}"
    assert stop_strings(WithTemplate(text)) == ()


def test_stop_string_that_is_a_special_token_ends_a_response_by_its_id(tmp_path):
    """Text shows no special tokens: such a stop string is never seen there."""
    config = saved(
        tmp_path, model=tiny_model("llama", tiny_tokenizer()), **DOLLY | {"eos_token": None}
    )
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    assert sampling_for(policy, tokenizer, 8, 1.0).stop_ids == (EOS, VOCAB)
    assert policy.generation_config.eos_token_id == [EOS, VOCAB]  # what other servers obey
    config = saved(tmp_path, chat_template="dolly")
    plain = load_tokenizer(config)
    assert sampling_for(load_policy(config, plain), plain, 8, 1.0).stop_ids == (EOS,)


# --- The text of a response -----------------------------------------------------------------------

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
@pytest.mark.parametrize("template", OWN_TEMPLATES)
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
    scores = score_sampled(actors, prompts, sampled)
    assert given == said and scores.total.tolist() == [1.0, 1.0, 0.0]


def test_response_text_ends_before_the_first_stop_string_and_the_whitespace_there():
    tokenizer = get_tokenizer(
        "byte", declare_stop_strings(chat_template_text("plain"), ["END", "\nQ"])
    )
    for said, text in (
        ("Yo \n\nEND", "Yo"),
        ("Yo\nQ: END", "Yo"),
        ("a END b\nQ", "a"),
        (" Yo<eos>", " Yo"),
        ("Yo \n<eos>", "Yo"),
        ("EN D", "EN D"),
        ("END", ""),
    ):
        assert response_text(tokenizer(said)["input_ids"], tokenizer) == text
    tokenizer = get_tokenizer("byte", "plain")
    assert response_text(tokenizer("Yo END \n<eos>")["input_ids"], tokenizer) == "Yo END \n"
    assert response_text(tokenizer("a , b .")["input_ids"], tokenizer) == "a , b ."


@pytest.mark.parametrize("template", ["baize", "falcon", "dolly", "llama2", "plain"])
def test_reward_model_scores_sampled_ids_and_their_text_alike(tmp_path, template):
    tokenizer = get_tokenizer("byte", template)
    directory = tmp_path / "base"
    saved(directory, tokenizer, tiny_model("llama", tokenizer))
    source = ModelConfig(str(directory))
    final = tmp_path / "final"
    ours = load_tokenizer(source)
    record = make_record("reward", StageConfig(), None, ours)
    write_stage(final, init_reward_model(source, ours, 0), ours, StageConfig(), record)
    scorer = RewardModelScorer(ScorerConfig(str(final), normalize="none"))
    prompts = [[user("Hi")], [user("Hi"), assistant("Yo."), user("And\n\nnow?")]]
    sampled = [encode_response(prompts[0], answer, ours) for answer in ("It is.", "Two\n\nlines")]
    texts = [response_text(ids, ours) for ids in sampled]
    rendered = [encode_prompt(p, ours) + ids for p, ids in zip(prompts, sampled, strict=True)]
    assert [scorer.encode(p, t) for p, t in zip(prompts, texts, strict=True)] == rendered
    exact(scorer(prompts, texts), score_sequences(scorer.model, rendered, 2))
    has_eos = sampled[0][-1] == ours.eos_token_id
    assert has_eos == (template in ("llama2", "plain"))
