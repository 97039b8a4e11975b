"""A trained reward model as a scorer: its normalisation, and how it renders conversations.

Leaves out loading and heads of reward models (tests/models).

Run: python -m pytest tests/scorers/test_reward_model_scorer.py
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.scorers import (
    MEAN,
    PROMPTS,
    RESPONSES,
    STD,
    policy_tokenizer,
    raw_scores,
    rendered,
    write_reward_model,
    write_stage_of,
)
from helpers.tiny import tiny_tokenizer
from helpers.tiny_ppo import make_config, make_trainer
from helpers.tokenizers import adds_bos
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from rlhf import train_ppo
from rlhf.config import InputError, ModelConfig, PeftConfig, ScorerComponent, ScorerConfig
from rlhf.data import encode_prompt
from rlhf.demo.world import build_tokenizer
from rlhf.models import ScalarModel, add_lora, init_reward_model, merged
from rlhf.scorers import RewardModelScorer, Tokens, load_scorer, score_responses, uncut_scores
from rlhf.tokenizer import chat_template_text, hash_rendering, load_tokenizer


def test_scores_are_normalised_by_what_the_reward_stage_stored(helpful):
    raw = raw_scores(helpful, rendered(policy_tokenizer()))
    for normalize, expected in (
        ("none", raw),
        ("demo_mean_zero", raw - MEAN),
        ("standardise", (raw - MEAN) / STD),
    ):
        scorer = load_scorer(ScorerConfig(helpful, normalize))
        assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-6)
    assert_close(load_scorer(ScorerConfig(helpful))(PROMPTS, RESPONSES), raw - MEAN)


def test_a_normalisation_that_does_not_exist_is_refused(helpful):
    with pytest.raises(InputError, match="scorer.normalize must be one of .*, got 'shift'"):
        load_scorer(ScorerConfig(helpful, "shift"))


def test_normalisation_without_stored_statistics_names_the_way_out(helpful, tmp_path):
    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(helpful).save_pretrained(bare)
    policy_tokenizer().save_pretrained(bare)
    with pytest.raises(InputError, match=f"{bare} has none; .* scorer.normalize=none"):
        load_scorer(ScorerConfig(str(bare)))
    raw = raw_scores(helpful, rendered(policy_tokenizer()))
    assert_close(load_scorer(ScorerConfig(str(bare), "none"))(PROMPTS, RESPONSES), raw)
    components = [ScorerComponent(helpful), ScorerComponent(str(bare))]
    with pytest.raises(InputError, match=r"set scorer.components\[1\].normalize=none"):
        load_scorer(ScorerConfig(components=components))


@pytest.mark.parametrize(
    "statistics", [{"score_std": -2.0}, {"score_std": math.inf}, {"score_mean": math.nan}], ids=str
)
def test_statistics_that_would_turn_or_lose_the_scores_are_refused(statistics, helpful, tmp_path):
    file = shutil.copytree(helpful, tmp_path / "final") / "rlhf.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | statistics))
    with pytest.raises(InputError, match=r"scorer\.path=.*rlhf.json has score_mean=.*correct them"):
        load_scorer(ScorerConfig(str(tmp_path / "final"), "standardise"))


def test_a_scorer_without_a_path_is_refused():
    with pytest.raises(InputError, match="scorer.path is missing: give the final/ of a reward"):
        load_scorer(ScorerConfig())


def test_a_policy_is_no_component(helpful):
    policy = str(Path(helpful).parents[1] / "base")
    components = [ScorerComponent(helpful), ScorerComponent(policy, normalize="none")]
    with pytest.raises(InputError, match=r"scorer.components\[1\].path=.*is not a reward model"):
        load_scorer(ScorerConfig(components=components))


def test_a_reward_model_saved_with_lora_scores_as_it_did_in_memory(helpful, tmp_path):
    tokenizer = policy_tokenizer()
    source = ModelConfig(path=str(Path(helpful).parents[1] / "base"))
    model = add_lora(init_reward_model(source, tokenizer, 7), PeftConfig(r=4), "SEQ_CLS", 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    path = write_stage_of(tmp_path, merged(model), tokenizer)
    sequences = rendered(tokenizer)
    with torch.no_grad():
        values = [
            ScalarModel(model.eval())(torch.tensor([s]), torch.ones(1, len(s)) == 1)
            for s in sequences
        ]
    expected = torch.stack([value[0, -1] for value in values])
    scorer = load_scorer(ScorerConfig(path, "none"))
    assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-5)
    base = raw_scores(helpful, sequences)
    assert ((expected - base).abs() > 0.1).all()  # or the adapter shows nothing


def test_a_conversation_beyond_the_context_of_the_reward_model_is_an_error(helpful):
    scorer = load_scorer(ScorerConfig(helpful))
    assert scorer.max_length == 128
    with pytest.raises(
        InputError, match="1 of 2 responses, with their prompts, exceed the context"
    ):
        scorer(["Fruit?"] * 2, ["An apple.", "y" * 129])


def test_prompts_beyond_the_context_of_the_reward_model_are_dropped_before_training(
    policy_dir, tmp_path, capsys
):
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_dir)))
    path = write_reward_model(tmp_path / "short", tokenizer, seed=1, max_position_embeddings=32)
    config = make_config(policy_dir, tmp_path, num_updates=1, batch_size=4)
    config.evaluation.num_prompts = 1
    config.scorer = ScorerConfig(path)
    assert train_ppo(config).directory is not None
    assert "longer than ppo.max_prompt_length=20 tokens" in capsys.readouterr().out
    config.run_name, config.ppo.response_length = "other", 32
    with pytest.raises(InputError, match="no room for a prompt in the model.s context of 32"):
        train_ppo(config)


def test_a_reward_model_that_gives_nan_stops_the_run(helpful):
    scorer = load_scorer(ScorerConfig(helpful))
    with torch.no_grad():
        scorer.model.model.score.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="x returned nan for 3 of 3 responses"):
        uncut_scores(scorer, PROMPTS, RESPONSES, "x")


# --- Rendering ------------------------------------------------------------------------------------


def sampled(tokenizer, texts=RESPONSES) -> Tokens:
    """Responses spelt out in other ids than the tokenizer would choose: one token a byte."""
    spelt = [
        [*(tokenizer.convert_tokens_to_ids(list(t.replace(" ", "Ġ")))), tokenizer.eos_token_id]
        for t in texts
    ]
    assert tokenizer.batch_decode(spelt, skip_special_tokens=True) == list(texts)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    assert [p + s for p, s in zip(prompts, spelt, strict=True)] != rendered(tokenizer)
    return Tokens(prompts, spelt, hash_rendering(tokenizer))


def other_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("alpaca")
    return tokenizer


def other_splits():
    """The same vocabulary, special tokens and template, but it keeps white space apart."""
    from tokenizers import pre_tokenizers

    tokenizer = policy_tokenizer()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), byte_level]
    )
    return tokenizer


def test_the_same_tokenizer_scores_the_ids_that_were_sampled(helpful):
    tokenizer = policy_tokenizer()
    tokens = sampled(tokenizer)
    scorer = load_scorer(ScorerConfig(helpful, "none"))
    ids = [[*p, *r] for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
    expected = raw_scores(helpful, ids)
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", tokens).total
    assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    from_text = scorer(PROMPTS, RESPONSES)
    assert_close(from_text, raw_scores(helpful, rendered(tokenizer)), rtol=1e-5, atol=1e-6)
    assert ((scores - from_text).abs() > 0.1).any()


@pytest.mark.parametrize("build", [build_tokenizer, other_template, other_splits])
def test_another_tokenizer_or_template_renders_the_conversation_itself(build, tmp_path):
    theirs, ours = build(), policy_tokenizer()
    assert rendered(theirs) != rendered(ours)
    path = write_reward_model(tmp_path, theirs, seed=3)
    scorer = load_scorer(ScorerConfig(path, "none"))
    expected = raw_scores(path, rendered(theirs))
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", sampled(ours)).total
    assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-6)
    assert [scorer.encode(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)] == rendered(
        theirs
    )


def test_each_component_goes_its_own_way(helpful, tmp_path):
    ours, tokens = policy_tokenizer(), sampled(policy_tokenizer())
    foreign = write_reward_model(tmp_path, build_tokenizer(), seed=3)
    components = [ScorerComponent(helpful, name="ids"), ScorerComponent(foreign, name="text")]
    scorer = load_scorer(ScorerConfig(components=components, normalize="none"))
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", tokens)
    ids = [[*p, *r] for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
    by_ids, by_text = raw_scores(helpful, ids), raw_scores(foreign, rendered(build_tokenizer()))
    assert_close(scores.components["ids"], by_ids, rtol=1e-5, atol=1e-6)
    assert_close(scores.components["text"], by_text, rtol=1e-5, atol=1e-6)
    assert rendered(ours) != ids


def test_the_hash_of_a_rendering_survives_saving_and_padding_and_sees_every_difference(tmp_path):
    tokenizer = policy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    loaded(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert hash_rendering(loaded) == hash_rendering(tokenizer)
    pad = policy_tokenizer()
    pad.pad_token = "!"
    assert hash_rendering(pad) == hash_rendering(tokenizer)  # masks come from lengths
    tokenizers = [tokenizer, build_tokenizer(), other_template(), other_splits()]
    assert len({hash_rendering(t) for t in tokenizers}) == len(tokenizers)


def test_a_template_that_refuses_the_conversation_is_the_cause_that_is_named(tmp_path):
    path = write_reward_model(tmp_path, build_tokenizer(), seed=3)
    prompt = [{"role": "system", "content": "be brief"}, *PROMPTS[0]]
    with pytest.raises(InputError, match="the chat template refuses .*system, user"):
        uncut_scores(load_scorer(ScorerConfig(path)), [prompt], ["dog ."], "the scorer")


def test_ppo_scores_ids_under_the_same_rendering_and_says_when_it_cannot(
    policy_dir, tmp_path, capsys
):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    same = write_reward_model(tmp_path / "same", load_tokenizer(config.model), seed=1)
    for path, said in ((same, False), (None, True)):
        path = path or write_reward_model(tmp_path / "other", other_template(), seed=1)
        config.scorer = ScorerConfig(path, "none")
        trainer = make_trainer(config, tmp_path)
        assert ("has another tokenizer or chat template" in capsys.readouterr().out) == said
        rollout = trainer.collect()
        masks = zip(rollout.sequence_ids, rollout.sequence_mask, strict=True)
        ids = [row[mask].tolist() for row, mask in masks]
        if not said:
            assert_close(rollout.scores, raw_scores(path, ids), rtol=1e-5, atol=1e-5)


class Squashed(LlamaForSequenceClassification):
    """Code of somebody else, whose scores are not what its linear head gives."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits.sigmoid()
        return output


class Named(LlamaForSequenceClassification):
    """Code of somebody else that changes nothing."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Squashed, Named])
def test_a_model_whose_own_code_scores_in_another_way_is_refused(kind, dtype, helpful):
    config, model = ScorerConfig(helpful, "standardise"), kind.from_pretrained(helpful).eval()
    model.to(dtype).score.float()  # as `load_reward_model` gives it
    if kind is Named:
        scores = RewardModelScorer(config, load=lambda *_: model)(PROMPTS, RESPONSES)
        far = 1e-5 if dtype is torch.float32 else 0.05
        assert_close(scores, load_scorer(config)(PROMPTS, RESPONSES), rtol=0, atol=far)
        return
    with pytest.raises(InputError, match="the code of Squashed gives other scores than its linear"):
        RewardModelScorer(config, load=lambda *_: model)


class WithTwoLayers(LlamaForSequenceClassification):
    """Code of somebody else whose head is no linear layer: it scores texts as a whole."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Sequential(self.score, torch.nn.Tanh())


def test_a_template_and_a_tokenizer_that_both_write_bos_give_one(helpful, tmp_path):
    model = WithTwoLayers.from_pretrained(helpful).eval()
    tokenizer = adds_bos()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.pad_token = None
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardModelScorer(ScorerConfig(str(tmp_path), "none"), load=lambda *_: model)
    ids = scorer.encode([{"role": "user", "content": "Hi"}], "Yo")
    assert ids == [tokenizer.bos_token_id, *tokenizer("HiYo")["input_ids"][1:]]
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Name a fruit.")]
    with torch.no_grad():
        rows = [torch.tensor([scorer.encode(p, r)]) for p, r in zip(prompts, "ab", strict=True)]
        expected = torch.cat([model(input_ids=row).logits.flatten() for row in rows])
    assert_close(scorer(prompts, ["a", "b"]), expected, rtol=1e-5, atol=1e-6)


def test_prompts_of_a_form_that_the_model_has_not_seen_are_warned_about_once(
    helpful, tmp_path, capsys
):
    file = shutil.copytree(helpful, tmp_path / "final") / "rlhf.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": "conversation"}))
    scorer = load_scorer(ScorerConfig(str(tmp_path / "final")))
    scorer(PROMPTS, RESPONSES)
    assert not capsys.readouterr().err
    for _ in range(2):
        scorer(["name three animals"] * 3, RESPONSES)
    said = capsys.readouterr().err
    assert said.count("was trained on conversation prompts, but these are text prompts") == 1
