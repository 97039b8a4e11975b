"""A model whose pad token is EOS, or that has none, keeps its size in all three stages.

Run: python -m pytest tests/end_to_end/test_pad_is_eos.py
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers.stages import ppo_config, reward_config, sft_config
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import saved
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import make_record, require_same_tokenizer
from rlhf.config import ModelConfig, PeftConfig, PPOStageConfig, ScorerConfig
from rlhf.data import RankedCollator, encode_prompt, encode_response
from rlhf.models import load_policy, new_token_rows
from rlhf.sampling import sampling_for
from rlhf.scorers import load_scorer
from rlhf.tokenizer import hash_rendering, hash_tokenizer, load_tokenizer, pad_with_no_stop_id

VOCAB, EOS = 320, 2
PROMPT = [{"role": "user", "content": "name three animals"}]


def without_pad():
    """A tokenizer as GPT-2's: EOS is its only special token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] == "<eos>"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def pads_with_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module", params=[without_pad, pads_with_eos])
def base(request, tmp_path_factory):
    tokenizer = request.param()
    folder = tmp_path_factory.mktemp(request.param.__name__)
    saved(folder, tokenizer, tiny_model("llama", tiny_tokenizer()))
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    configs = [sft_config(folder, model=ModelConfig(path=str(base))), reward_config(folder)]
    for config in configs:
        config.trainer |= {"max_steps": 2}
        config.dataset = type(config.dataset)(**vars(config.dataset) | {"max_length": 128})
    train_sft(configs[0])
    train_reward(configs[1])
    ppo = ppo_config(folder)
    ppo.ppo.num_updates = 1
    train_ppo(ppo)
    return folder / "run"


def test_no_stage_adds_a_row_or_a_token(runs):
    for folder in ("sft/final", "reward/final", "ppo/final", "ppo/critic"):
        weights = load_file(runs / folder / "model.safetensors")
        assert weights["model.embed_tokens.weight"].shape[0] == VOCAB
        assert len(AutoTokenizer.from_pretrained(runs / folder)) == VOCAB


def test_transformers_alone_gives_our_scores_of_a_batch_of_different_lengths(runs):
    path = str(runs / "reward/final")
    responses = ["dog .", "a red dog and a wolf .", "cat", "It is ÿ, Haÿ and so on."]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [
        encode_prompt(PROMPT, tokenizer) + encode_response(PROMPT, response, tokenizer)
        for response in responses
    ]
    assert all(row[-1] == EOS for row in rows)
    scorer = load_scorer(ScorerConfig(path=path, normalize="none"))
    ours = scorer([PROMPT] * len(responses), responses)
    for side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**batch).logits[:, 0]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert ours.std() > 1e-3


def test_a_reward_model_with_its_own_pad_token_still_reads_the_ids_of_the_policy(runs):
    policy = load_tokenizer(ModelConfig(path=str(runs / "ppo/final")))
    reward = load_tokenizer(ModelConfig(path=str(runs / "reward/final")))
    assert policy.pad_token_id == EOS != reward.pad_token_id
    assert hash_rendering(policy) == hash_rendering(reward)


def test_eos_is_sampled_and_counts_in_every_loss_although_it_pads(base):
    config = ModelConfig(path=str(base))
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    assert EOS not in sampling_for(policy, tokenizer, 8, 1.0).forbidden
    assert policy.get_input_embeddings().padding_idx is None  # its row has a gradient
    rows = [{"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS]}, {"input_ids": [7], "labels": [7]}]
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(rows)
    assert batch["labels"].tolist() == [[-100, 6, EOS], [7, -100, -100]]
    ranked = RankedCollator(tokenizer.pad_token_id)(
        [{"input_ids": [[5, EOS], [5, 6, 7, EOS]], "ranks": [0, 1]}]
    )
    assert ranked["attention_mask"].sum(dim=1).tolist() == [2, 4]


def test_a_pad_token_that_a_model_also_stops_at_is_sampled(tmp_path):
    model = tiny_model("llama", tiny_tokenizer())
    model.generation_config.eos_token_id = [EOS, 0]  # as Qwen's, which pads with <|endoftext|>
    config = saved(tmp_path, tiny_tokenizer(), model)
    tokenizer = load_tokenizer(config)
    assert sampling_for(load_policy(config, tokenizer), tokenizer, 8, 1.0).forbidden.tolist() == []


def test_a_new_token_that_is_eos_is_trained_although_it_pads(tmp_path):
    config = saved(tmp_path, without_pad(), special_tokens=["### End"], eos_token="### End")
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == tokenizer.eos_token == "### End"
    assert new_token_rows(tokenizer, config, PeftConfig(enabled=True)) == [VOCAB]


# --- The pad token of a reward model ------------------------------------------------------------


def chosen_pad(tokenizer, stop_ids):
    pad_with_no_stop_id(tokenizer, stop_ids)
    assert len(tokenizer) == VOCAB and tokenizer.pad_token_id not in stop_ids
    return tokenizer.pad_token


def test_a_pad_token_that_ends_no_answer_is_kept():
    assert chosen_pad(tiny_tokenizer(), {EOS}) == "<pad>"


def test_an_unknown_token_pads_before_an_unused_special_token_and_this_before_a_byte():
    tokenizer = pads_with_eos()
    tokenizer.unk_token = "<bos>"
    assert chosen_pad(tokenizer, {EOS}) == "<bos>"
    assert chosen_pad(pads_with_eos(), {EOS}) == "<pad>"
    assert chosen_pad(pads_with_eos(), {EOS, 0}) == "ÿ"  # and not BOS, which begins sequences
    assert chosen_pad(load_tokenizer_without_pad(), {EOS}) == "ÿ"


def load_tokenizer_without_pad():
    tokenizer = without_pad()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_a_byte_that_pads_changes_no_text_but_its_own_letter_as_a_word(tmp_path):
    plain, padded = load_tokenizer_without_pad(), load_tokenizer_without_pad()
    pad_with_no_stop_id(padded, {EOS})
    padded.save_pretrained(tmp_path)
    padded = AutoTokenizer.from_pretrained(tmp_path)
    text = "L'Haÿ-les-Roses, Pierre Louÿs\nAn apple is a fruit.<eos>"
    assert padded(text)["input_ids"] == plain(text)["input_ids"]
    assert hash_rendering(padded) == hash_rendering(plain)


# --- Directories of earlier versions ------------------------------------------------------------


def test_a_directory_with_an_added_row_still_loads_and_fits_its_reward_model(tmp_path):
    tokenizer = without_pad()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model = tiny_model("llama", tiny_tokenizer(), vocab_size=VOCAB + 1, pad_token_id=VOCAB)
    config = saved(tmp_path, tokenizer, model)
    loaded = load_tokenizer(config)
    assert (loaded.pad_token_id, len(loaded)) == (VOCAB, VOCAB + 1)
    policy = load_policy(config, loaded)
    assert policy.get_input_embeddings().weight.shape[0] == VOCAB + 1
    assert sampling_for(policy, loaded, 8, 1.0).forbidden.tolist() == [VOCAB]
    record = make_record("reward", PPOStageConfig(), None, loaded)
    assert record.tokenizer == hash_tokenizer(tokenizer)  # as earlier versions recorded it
    require_same_tokenizer(loaded, record, "model.path=a", "scorer.path=b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == VOCAB + 1
