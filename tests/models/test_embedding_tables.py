"""Embedding tables that are cut to the tokenizer, or grow for new tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.rows import assistant, user
from helpers.tensors import exact
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer, pythia, runs_of_labels, saved
from transformers import AutoModelForCausalLM

from rlhf.config import InputError, ModelConfig
from rlhf.data import encode_response, encode_row
from rlhf.models import init_reward_model, load_policy, load_reward_model, resize_embeddings
from rlhf.sampling import sampling_for
from rlhf.tokenizer import load_tokenizer, response_text

VOCAB, EOS = 320, 2
DOLLY_TOKENS = ["### End", "### Instruction:", "### Response:\n"]
DOLLY = {"special_tokens": DOLLY_TOKENS, "eos_token": "### End", "chat_template": "dolly"}


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
