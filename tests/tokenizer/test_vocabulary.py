"""Special tokens, tables that are cut, and stop strings: what load_tokenizer and load_policy make
of them, what is saved, and what a sampled response says.

Run: python -m pytest tests/tokenizer/test_vocabulary.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.rows import assistant, user
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer, pythia, runs_of_labels, word_level
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import CONF_DIR, InputError, ModelConfig, ScorerConfig, StageConfig
from rlhf.data import encode_prompt, encode_response, encode_row
from rlhf.models import init_reward_model, load_policy, load_reward_model, resize_embeddings
from rlhf.sampling import sampling_for, stop_token_ids
from rlhf.scorers import RewardModelScorer
from rlhf.tokenizer import (
    chat_template_text,
    declare_stop_strings,
    forbidden_token_ids,
    load_tokenizer,
    response_text,
    stop_strings,
)

VOCAB, EOS = 320, 2
DOLLY_TOKENS = ["### End", "### Instruction:", "### Response:\n"]
DOLLY = {"special_tokens": DOLLY_TOKENS, "eos_token": "### End", "chat_template": "dolly"}


def saved(directory, tokenizer=None, model=None, **knobs):
    """Configuration of a model directory with a tokenizer, and a model where one is given."""
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    if model is not None:
        model.save_pretrained(directory)
    return ModelConfig(path=str(directory), **knobs)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- Special tokens -----------------------------------------------------------------------------


def test_special_tokens_are_one_id_each_and_stay_so_when_saved(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, special_tokens=DOLLY_TOKENS))
    tokenizer.save_pretrained(tmp_path / "final")
    for own in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "final")):
        for i, token in enumerate(DOLLY_TOKENS):
            assert own(token)["input_ids"] == [VOCAB + i]
            assert own(f"a\n\n{token}b")["input_ids"].count(VOCAB + i) == 1
        assert own.decode([74, VOCAB, VOCAB + 2], skip_special_tokens=True) == own.decode([74])
        assert (own.eos_token_id, own.pad_token_id) == (EOS, 0)
    again = load_tokenizer(ModelConfig(str(tmp_path / "final"), special_tokens=DOLLY_TOKENS))
    assert again.get_vocab() == tokenizer.get_vocab()


def test_policy_stops_at_the_eos_token_that_takes_the_place_of_its_own(tmp_path):
    model = tiny_model("llama", tiny_tokenizer())
    model.generation_config.eos_token_id = [EOS, 5]
    config = saved(tmp_path, model=model, **DOLLY)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    assert tokenizer.eos_token_id == VOCAB and tokenizer.pad_token_id == 0
    record = make_record("sft", StageConfig(), None, tokenizer)
    assert record.eos_token_id == VOCAB
    write_stage(tmp_path / "final", policy, tokenizer, StageConfig(), record)
    reread = ModelConfig(str(tmp_path / "final"))  # as chat and the next stage load it
    tokenizer = load_tokenizer(reread)
    policy = load_policy(reread, tokenizer)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("### End", VOCAB)
    assert policy.config.eos_token_id == policy.generation_config.eos_token_id == VOCAB
    assert stop_token_ids(policy, tokenizer) == (VOCAB,)
    assert VOCAB not in forbidden_token_ids(tokenizer, VOCAB + 3)


def test_policy_keeps_its_own_stop_tokens_beside_the_tokenizers_eos(tmp_path):
    model = tiny_model("llama", tiny_tokenizer())
    model.generation_config.eos_token_id = [7, 5]  # as of a model whose answers end otherwise
    config = saved(tmp_path, model=model)
    policy = load_policy(config, load_tokenizer(config))
    assert policy.generation_config.eos_token_id == [EOS, 7, 5]
    assert policy.config.eos_token_id == EOS
    assert stop_token_ids(policy, load_tokenizer(config)) == (EOS, 5, 7)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_key_token_that_splits_into_several_ids_is_refused_with_the_fix(tmp_path, name):
    config = saved(tmp_path, **{name: "END"})
    ids = tiny_tokenizer()("END")["input_ids"]
    assert len(ids) == 3
    with pytest.raises(InputError) as error:
        load_tokenizer(config)
    assert str(error.value) == (
        f"model.{name}='END' must be one id at every place in a text, but the tokenizer of "
        f"{tmp_path} splits it into 3 ids, {ids}; add it to model.special_tokens: "
        "model.special_tokens=['END']"
    )
    config.special_tokens = ["END"]
    assert getattr(load_tokenizer(config), f"{name}_id") == VOCAB


def test_key_token_that_is_one_id_alone_and_another_inside_a_text_is_refused(tmp_path):
    tokenizer = get_tokenizer("llama")  # "!" alone is "_!"
    with pytest.raises(InputError, match=r"model.eos_token='!' must be one id.* other ids inside"):
        load_tokenizer(saved(tmp_path / "llama", tokenizer, eos_token="!"))
    config = saved(tmp_path / "byte", special_tokens=["END", "\n\nEND"])
    with pytest.raises(InputError, match="model.special_tokens='END' .* none is part of another"):
        load_tokenizer(config)


def test_word_that_the_tokenizer_does_not_know_is_no_key_token(tmp_path):
    tokenizer = word_level()
    tokenizer.unk_token = "<unk>"
    assert tokenizer("zebra")["input_ids"] == [tokenizer.convert_tokens_to_ids("zebra")]
    with pytest.raises(InputError, match="model.pad_token='zebra' must be one id"):
        load_tokenizer(saved(tmp_path, tokenizer, pad_token="zebra"))


def test_pad_token_that_is_eos_is_refused(tmp_path):
    with pytest.raises(InputError, match="model.pad_token='<eos>' is also the EOS token of"):
        load_tokenizer(saved(tmp_path, pad_token="<eos>"))


def test_pad_token_of_choice_is_kept_and_one_that_becomes_eos_is_replaced(tmp_path):
    config = saved(tmp_path, pad_token="<bos>")
    tokenizer = load_tokenizer(config)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<bos>", 1, VOCAB)
    tokenizer = load_tokenizer(saved(tmp_path, eos_token="<pad>"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, VOCAB)


def test_eos_token_of_choice_serves_a_tokenizer_that_has_none(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert load_tokenizer(saved(tmp_path, tokenizer, eos_token="<eos>")).eos_token_id == EOS


# --- Tables -------------------------------------------------------------------------------------


def tables_of(model):
    """Embeddings, head and the head's bias, where there are any."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight]
    return found + ([] if head is None else [t for t in (head.weight, head.bias) if t is not None])


CASES = [("llama", False), ("llama", True), ("gpt_neox", False), ("gptj", False), ("gpt2", True)]


@pytest.mark.parametrize("family, tied", CASES)
def test_cut_table_keeps_the_bits_of_the_rows_that_stay(tmp_path, family, tied):
    model = tiny_model(family, tiny_tokenizer(), vocab_size=VOCAB + 24, tie_word_embeddings=tied)
    config = saved(tmp_path, model=model, shrink_embeddings=True)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    policy.save_pretrained(tmp_path / "final")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.tensor([[40, 41, 42, 319]])
    for cut in (policy, reread):
        assert cut.config.vocab_size == VOCAB
        for table, old in zip(tables_of(cut), tables_of(model), strict=True):
            exact(table, old[:VOCAB])
        heads = cut.get_input_embeddings().weight, cut.get_output_embeddings().weight
        assert (heads[0] is heads[1]) == tied
        with torch.no_grad():
            torch.testing.assert_close(cut(ids).logits, model(ids).logits[..., :VOCAB])
    config.shrink_embeddings = False
    assert load_policy(config, tokenizer).config.vocab_size == VOCAB + 24


@pytest.mark.parametrize("family, tied", CASES)
def test_new_rows_are_the_mean_of_the_old_in_every_table(family, tied):
    model = tiny_model(family, tiny_tokenizer(), tie_word_embeddings=tied)
    before = [table.detach().clone() for table in tables_of(model)]
    assert len(before) == (3 if family == "gptj" else 2)
    resize_embeddings(model, VOCAB + 3, shrink=True)  # a table that is too small grows all the same
    for table, old in zip(tables_of(model), before, strict=True):
        exact(table[:VOCAB], old)
        expected = old.double().mean(dim=0).float().expand_as(table[VOCAB:])
        torch.testing.assert_close(table[VOCAB:], expected, rtol=1e-5, atol=1e-6)


def test_reward_model_of_a_padded_policy_is_cut_too_and_reloads(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt_neox", tokenizer, vocab_size=VOCAB + 24)
    config = saved(tmp_path, tokenizer, model, shrink_embeddings=True)
    reward_model = init_reward_model(config, load_tokenizer(config), seed=0)
    reward_model.save_pretrained(tmp_path / "final")
    reread = load_reward_model(ModelConfig(str(tmp_path / "final")))
    assert reward_model.config.vocab_size == reread.config.vocab_size == VOCAB
    for cut in (reward_model, reread):
        exact(cut.get_input_embeddings().weight, model.get_input_embeddings().weight[:VOCAB])
    exact(reread.score.weight, reward_model.score.weight)


def test_table_is_not_cut_to_the_tokenizer_of_another_model(tmp_path):
    model = tiny_model("llama", tiny_tokenizer(), vocab_size=1000, eos_token_id=[2, 900])
    config = saved(tmp_path, model=model, shrink_embeddings=True)
    with pytest.raises(InputError, match="leaves 320 rows.*the model's own eos_token_id is 900"):
        load_policy(config, load_tokenizer(config))


def test_dolly_on_the_real_tokenizer_of_pythia_and_its_padded_table(tmp_path):
    get_tokenizer("pythia")  # skips where it is not
    original, text = pythia(), "<|endoftext|>"
    original.bos_token = original.unk_token = text
    model = tiny_model("gpt_neox", original, vocab_size=50304, hidden_size=16, pad_token_id=0)
    config = saved(tmp_path, original, model, pad_token=text, shrink_embeddings=True, **DOLLY)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    end, response = 50277, 50279
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (end, 0, 50280)
    assert policy.config.vocab_size == 50280
    for table, old in zip(tables_of(policy), tables_of(model), strict=True):
        exact(table, old[:50280])
    messages = [user("When?"), assistant("In 1902."), user("Why?"), assistant("Ask them.")]
    ids, labels = encode_row({"messages": messages}, tokenizer)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith("Below is") and 0 not in ids  # no BOS: it is the pad token now
    assert tokenizer.decode(ids) == rendered
    first = ids.index(response)
    assert set(labels[: first + 1]) == {-100} and labels[first + 1] == ids[first + 1] != -100
    stretches = runs_of_labels(ids, labels)
    expected = [[*original("In 1902.\n\n").input_ids, end], [*original("Ask them.\n\n").input_ids]]
    assert stretches == [expected[0], [*expected[1], end]] and labels[-1] == end
    assert ids.count(response) == 2 and ids.count(50278) == 2
    assert encode_response(messages[:1], "In 1902.", tokenizer) == stretches[0]
    assert response_text(stretches[0], tokenizer) == "In 1902."
    sampling = sampling_for(policy, tokenizer, 8, 1.0)
    assert sampling.stop_ids == (end,) and sampling.forbidden.tolist() == [0]


# --- Stop strings of a template -----------------------------------------------------------------


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


# --- What a response says -----------------------------------------------------------------------


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
    exact(scorer(prompts, texts), scorer.score_ids(rendered))
    has_eos = sampled[0][-1] == ours.eos_token_id
    assert has_eos == (template in ("llama2", "plain"))
