"""Special tokens, EOS and pad of choice: what load_tokenizer and load_policy make of them."""

from __future__ import annotations

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer, saved, word_level
from transformers import AutoTokenizer

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import InputError, ModelConfig, StageConfig
from rlhf.models import load_policy
from rlhf.sampling import stop_token_ids
from rlhf.tokenizer import forbidden_token_ids, load_tokenizer

VOCAB, EOS = 320, 2
DOLLY_TOKENS = ["### End", "### Instruction:", "### Response:\n"]
DOLLY = {"special_tokens": DOLLY_TOKENS, "eos_token": "### End", "chat_template": "dolly"}


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


def test_pad_token_of_choice_is_kept_and_may_be_eos(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, pad_token="<bos>"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<bos>", 1, VOCAB)
    for choice in ({"pad_token": "<eos>"}, {"eos_token": "<pad>"}):
        tokenizer = load_tokenizer(saved(tmp_path, **choice))
        assert tokenizer.pad_token_id == tokenizer.eos_token_id and len(tokenizer) == VOCAB


def test_eos_token_of_choice_serves_a_tokenizer_that_has_none(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert load_tokenizer(saved(tmp_path, tokenizer, eos_token="<eos>")).eos_token_id == EOS
