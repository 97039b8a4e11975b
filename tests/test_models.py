"""Contract tests of rlhf.models on tiny models of two families, built and saved offline.

Run: pytest tests/test_models.py
"""

from __future__ import annotations

import functools
import json
import math
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from torch.testing import assert_close

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import InputError, ModelConfig, PeftConfig, ScorerConfig, StageConfig
from rlhf.functional import token_logprobs
from rlhf.generation import Generation, Sampling
from rlhf.models import (
    ScalarModel,
    add_lora,
    disable_dropout,
    forbidden_token_ids,
    freeze,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    merged,
    num_tokens,
    parameter_count,
    position_ids_from_mask,
    resize_embeddings,
    response_logits,
    sequence_scores,
)
from rlhf.rollout import _assemble, critic_values, policy_logprobs
from rlhf.scorers import RewardModelScorer, score_sequences

both_families = pytest.mark.parametrize("family", ["llama", "gpt_neox"])
TOKENIZER = tiny_tokenizer()
PAD, EOS, VOCAB = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)
PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61, 62]]
# Sequences of 7, 6 and 9 tokens: each needs other padding, on either side.
RESPONSES = [[101, 102], [103, 104, 105, 106, 107], [109, 110, 111, 112, 113, EOS]]
SEQUENCES = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
NONE_FORBIDDEN = torch.empty(0, dtype=torch.long)
LORA = PeftConfig(enabled=True, r=4, alpha=8)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def exact(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def close(actual, expected, atol=1e-6):
    assert_close(actual, expected, rtol=1e-5, atol=atol)


def save(directory, model, stage="sft", tokenizer=TOKENIZER, **record_values):
    """Write a stage directory and return the ModelConfig that loads it by path alone."""
    record = make_record(stage, StageConfig(), None, tokenizer)
    for name, value in record_values.items():
        setattr(record, name, value)
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return ModelConfig(path=str(directory))


@pytest.fixture(scope="module")
def saved_policy(tmp_path_factory):
    """family -> ModelConfig of a saved policy; each is written once."""

    @functools.cache
    def config(family):
        return save(tmp_path_factory.mktemp(family) / "final", tiny_model(family, TOKENIZER))

    return config


@pytest.fixture(scope="module")
def saved_reward_model(tmp_path_factory, saved_policy):
    """family -> ModelConfig of a saved reward model, with the head as it was initialised."""

    @functools.cache
    def config(family):
        model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
        directory = tmp_path_factory.mktemp(family) / "reward"
        return save(directory, model, "reward", score_mean=0.5, score_std=2.0)

    return config


def padded(sequences, side, fill=PAD):
    width = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        before = gap if side == "left" else 0
        ids.append([fill] * before + sequence + [fill] * (gap - before))
        mask.append([False] * before + [True] * len(sequence) + [False] * (gap - before))
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def logits_of(model, ids=SEQUENCES[0]):
    return model(input_ids=torch.tensor([ids])).logits


@torch.no_grad()
def scores_of(model, sequences=SEQUENCES):
    return score_sequences(ScalarModel(model).eval(), sequences, batch_size=8)


def rollout_of(prompts, responses, fill=PAD):
    sampled = Generation(responses, [[0.0] * len(r) for r in responses], [True] * len(responses))
    return _assemble([{"input_ids": p} for p in prompts], sampled, fill, torch.device("cpu"))


def train_policy(model, num_steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    ids = torch.tensor([SEQUENCES[0]])
    for _ in range(num_steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_scores(model, num_steps=3):
    scalar = ScalarModel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids, mask = padded(SEQUENCES, "right")
    for _ in range(num_steps):
        loss = (sequence_scores(scalar, ids, mask) - torch.tensor([1.0, -1.0, 2.0])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# --- Padding ------------------------------------------------------------------------------------


def test_positions_count_valid_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]).bool()
    exact(position_ids_from_mask(mask), torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 2, 3]]))


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_logprobs_do_not_depend_on_padding(family, side):
    model = tiny_model(family, TOKENIZER)

    def logprobs(ids, mask):
        with torch.no_grad():
            logits = response_logits(model, ids, mask, ids.shape[1] - 1, NONE_FORBIDDEN)
        return token_logprobs(logits, ids[:, 1:])

    # Any fill will do: what stands under the mask is not read.
    ids, mask = padded(SEQUENCES, side, fill=77)
    # A token can be predicted where it and the one before it are valid.
    predicted = mask[:, 1:] & mask[:, :-1]
    batch = logprobs(ids, mask)
    for row, sequence in enumerate(SEQUENCES):
        alone = logprobs(*padded([sequence], side))[0]
        close(batch[row][predicted[row]], alone)


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_scores_do_not_depend_on_padding(family, side, saved_reward_model):
    model = ScalarModel(load_reward_model(saved_reward_model(family)), mean=0.2, std=1.5).eval()
    ids, mask = padded(SEQUENCES, side, fill=77)
    with torch.no_grad():
        batch, scores = model(ids, mask), sequence_scores(model, ids, mask)
        for row, sequence in enumerate(SEQUENCES):
            alone = model(*padded([sequence], side))[0]
            close(batch[row][mask[row]], alone)
            close(scores[row], alone[-1])
    close(score_sequences(model, SEQUENCES, batch_size=2), scores)


@both_families
def test_rollout_layout_gives_the_numbers_of_each_sequence_alone(family, saved_reward_model):
    policy = tiny_model(family, TOKENIZER)
    critic = ScalarModel(load_reward_model(saved_reward_model(family))).eval()
    sampling = Sampling(6, (EOS,), forbidden_token_ids(TOKENIZER, VOCAB), temperature=0.7)
    rollout = rollout_of(PROMPTS, RESPONSES)
    with torch.no_grad():
        logprobs, _ = policy_logprobs(policy, rollout, sampling)
        values = critic_values(critic, rollout)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            ids = torch.tensor([prompt + response])
            logits = policy(ids).logits[0] / 0.7
            logits[:, PAD] = -math.inf
            start, end = len(prompt) - 1, len(prompt + response) - 1
            expected = logits[start:end].log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
            valid = rollout.response_mask[row]
            close(logprobs[row][valid], expected)
            close(values[row][valid], critic(ids, torch.ones_like(ids).bool())[0, start:end])


@both_families
def test_sequence_scores_read_the_last_valid_token_not_the_last_that_is_not_pad(family):
    class Positions(nn.Module):
        def forward(self, ids, mask):
            return torch.arange(ids.shape[1]).float().expand(ids.shape)

    ids = torch.tensor([[PAD, 5, 6, PAD, PAD], [5, 6, PAD, PAD, 9]])
    mask = torch.tensor([[False, True, True, True, False], [True, True, True, False, False]])
    exact(sequence_scores(Positions(), ids, mask), torch.tensor([3.0, 2.0]))


# --- Saving and loading -------------------------------------------------------------------------


@both_families
def test_saved_policy_loads_by_path_with_identical_logits(family, saved_policy):
    exact(
        logits_of(load_policy(saved_policy(family), TOKENIZER)),
        logits_of(tiny_model(family, TOKENIZER)),
    )


@both_families
def test_saved_tokenizer_loads_by_path(family, saved_policy):
    tokenizer = load_tokenizer(saved_policy(family))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)


@both_families
def test_saved_reward_model_loads_with_identical_scores(family, tmp_path, saved_policy):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    train_scores(model)
    config = save(tmp_path / "reward", model, "reward", score_mean=0.5, score_std=2.0)
    raw = scores_of(model)
    exact(scores_of(load_reward_model(config)), raw)
    for normalize, expected in (
        ("none", raw),
        ("demo_mean_zero", raw - 0.5),
        ("standardise", (raw - 0.5) / 2.0),
    ):
        scorer = RewardModelScorer(ScorerConfig(path=config.path, normalize=normalize))
        close(scorer.score_ids(SEQUENCES), expected)


@both_families
def test_reward_model_scores_are_head_times_hidden_state(family, saved_policy):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    policy = tiny_model(family, TOKENIZER)
    with torch.no_grad():
        for sequence, score in zip(SEQUENCES, scores_of(model), strict=True):
            hidden = policy.base_model(torch.tensor([sequence])).last_hidden_state[0, -1]
            close(score, hidden @ model.score.weight[0])


@both_families
def test_head_is_drawn_from_its_seed_with_variance_one_over_d_plus_one(family, tmp_path):
    wide = tiny_model(family, TOKENIZER, hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    config = save(tmp_path / "wide", wide)
    torch.manual_seed(1)
    head = init_reward_model(config, TOKENIZER, seed=3).score
    torch.manual_seed(2)
    again = init_reward_model(config, TOKENIZER, seed=3).score
    other = init_reward_model(config, TOKENIZER, seed=4).score
    assert head.weight.shape == (1, 1024) and head.weight.dtype == torch.float32
    assert head.bias is None and head.weight.requires_grad
    exact(head.weight, again.weight)
    assert not (head.weight == other.weight).any()
    # Four standard errors of a mean and of a standard deviation over 1024 draws.
    standard = head.weight * math.sqrt(1025)
    assert abs(standard.mean()) < 4 / math.sqrt(1024)
    assert abs(standard.std() - 1) < 4 / math.sqrt(2 * 1024)


@both_families
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bfloat16_load_keeps_the_head_exactly(family, dtype, tmp_path, saved_policy):
    half = ModelConfig(path=saved_policy(family).path, dtype="bfloat16")
    model = init_reward_model(half, TOKENIZER, seed=3)
    assert model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    path = save(tmp_path / "reward", model, "reward").path
    loaded = load_reward_model(ModelConfig(path=path, dtype=dtype))
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    exact(loaded.score.weight, model.score.weight)
    assert (model.score.weight != model.score.weight.bfloat16().float()).any()
    exact(scores_of(loaded), scores_of(model))
    assert scores_of(loaded).dtype == torch.float32


@both_families
def test_bfloat16_load_of_a_float32_reward_model_keeps_the_head(family, saved_reward_model):
    path = saved_reward_model(family).path
    loaded = load_reward_model(ModelConfig(path=path, dtype="bfloat16"))
    exact(loaded.score.weight, load_file(f"{path}/model.safetensors")["score.weight"])
    assert loaded.base_model.dtype == torch.bfloat16


# --- Refusals -----------------------------------------------------------------------------------


@both_families
def test_missing_head_weights_are_an_error_never_a_fresh_head(family, saved_policy):
    with pytest.raises(InputError, match=r"scorer\.path=.*score\.weight.*not a reward model"):
        load_reward_model(saved_policy(family))


def test_head_missing_from_a_reward_directory_is_an_error(tmp_path, saved_policy):
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    config = save(tmp_path / "reward", model, "reward")
    file = tmp_path / "reward/model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="score.weight"):
        load_reward_model(config)


def test_head_with_two_labels_is_an_error(tmp_path, saved_policy):
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    model.score = nn.Linear(32, 2, bias=False)
    with pytest.raises(
        InputError, match=r"scorer\.path=.*score\.weight.*not a reward model with one label"
    ):
        load_reward_model(save(tmp_path / "two", model, "reward"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused(tmp_path, name):
    model = tiny_model("llama", TOKENIZER)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / name)
    config = ModelConfig(path=str(tmp_path))
    for load in (load_policy, load_reference):
        with pytest.raises(InputError, match=rf"model\.path=.*pickled.*{name}.*safetensors"):
            load(config, TOKENIZER)
    with pytest.raises(InputError, match=name):
        load_reward_model(config)


def test_training_arguments_beside_safetensors_are_not_refused(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    config = save(tmp_path / "final", model)
    (tmp_path / "final/training_args.bin").write_bytes(b"")
    exact(logits_of(load_policy(config, TOKENIZER)), logits_of(model))


@pytest.mark.parametrize("name", ["nowhere", "runs/none/sft/final"])
def test_a_missing_directory_is_named(tmp_path, name):
    config = ModelConfig(path=str(tmp_path / name))
    for load in (
        lambda: load_policy(config, TOKENIZER),
        lambda: load_tokenizer(config),
        lambda: init_reward_model(config, TOKENIZER, seed=0),
    ):
        with pytest.raises(InputError, match=rf"model\.path={config.path}: no such directory"):
            load()
    with pytest.raises(InputError, match=rf"scorer\.path={config.path}: no such directory"):
        load_reward_model(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model.config has no model_type"),
        ({"model_type": "llamma"}, "model.config: .*llamma"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "model.config: "),
    ],
)
def test_a_model_config_that_cannot_be_built_is_an_input_error(values, message):
    with pytest.raises(InputError, match=message):
        load_policy(ModelConfig(config=values), TOKENIZER)


def test_a_model_is_built_for_the_tokenizer_it_gets():
    values = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    model = load_policy(ModelConfig(config=values), TOKENIZER)
    assert model.config.vocab_size == VOCAB
    for holder in (model.config, model.generation_config):
        assert (holder.pad_token_id, holder.eos_token_id) == (PAD, EOS)


# --- Tokenizer and embedding tables --------------------------------------------------------------


def saved_tokenizer(directory, **special):
    tokenizer = tiny_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    return ModelConfig(path=str(directory))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no EOS token; set it in"):
        load_tokenizer(saved_tokenizer(tmp_path, eos_token=None))


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_a_pad_token_is_added_when_there_is_none_of_its_own(tmp_path, pad_token):
    tokenizer = load_tokenizer(saved_tokenizer(tmp_path, pad_token=pad_token))
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == VOCAB
    assert tokenizer.eos_token_id == EOS and len(tokenizer) == VOCAB + 1


def test_a_pad_token_of_its_own_is_kept(tmp_path):
    assert load_tokenizer(saved_tokenizer(tmp_path)).pad_token_id == PAD


def test_policy_table_grows_for_an_added_pad_token(tmp_path):
    model = tiny_model("gpt_neox", TOKENIZER)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    config = save(tmp_path / "final", model, tokenizer=tokenizer)
    tokenizer = load_tokenizer(config)
    grown = load_policy(config, tokenizer)
    assert grown.config.vocab_size == VOCAB + 1 and grown.config.pad_token_id == VOCAB
    exact(logits_of(grown)[..., :VOCAB], logits_of(model))
    assert forbidden_token_ids(tokenizer, VOCAB + 1).tolist() == [VOCAB]


@both_families
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_both_tables_are_the_mean_of_the_old(family, tied):
    model = tiny_model(family, TOKENIZER, tie_word_embeddings=tied)
    tables = [model.get_input_embeddings, model.get_output_embeddings]
    before = [table().weight.detach().clone() for table in tables]
    resize_embeddings(model, VOCAB + 3)
    assert model.config.vocab_size == VOCAB + 3
    for table, old in zip(tables, before, strict=True):
        weight = table().weight
        exact(weight[:VOCAB], old)
        close(weight[VOCAB:], old.mean(dim=0).expand(3, -1))
    assert (tables[0]().weight is tables[1]().weight) == tied
    if not tied:
        assert not torch.equal(before[0], before[1])


@both_families
def test_a_larger_table_is_left_alone(family):
    model = tiny_model(family, TOKENIZER, vocab_size=VOCAB + 64)
    before = logits_of(model)
    resize_embeddings(model, VOCAB)
    exact(logits_of(model), before)
    assert before.shape[-1] == VOCAB + 64


def test_surplus_rows_of_a_padded_table_are_forbidden():
    forbidden = forbidden_token_ids(TOKENIZER, VOCAB + 4)
    assert forbidden.tolist() == [PAD, VOCAB, VOCAB + 1, VOCAB + 2, VOCAB + 3]
    assert forbidden.dtype == torch.long


def test_eos_is_never_forbidden_even_when_it_is_the_pad_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert forbidden_token_ids(tokenizer, VOCAB).tolist() == []
    assert EOS not in forbidden_token_ids(TOKENIZER, VOCAB).tolist()


@both_families
def test_response_logits_are_those_of_the_full_forward_with_forbidden_ids_at_minus_infinity(family):
    model = tiny_model(family, TOKENIZER, vocab_size=VOCAB + 4)
    forbidden = forbidden_token_ids(TOKENIZER, VOCAB + 4)
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        actual = response_logits(model, ids, torch.ones_like(ids).bool(), 2, forbidden)
        full = model(ids).logits[:, -3:-1]
    allowed = torch.ones(VOCAB + 4, dtype=torch.bool)
    allowed[forbidden] = False
    assert (actual[..., ~allowed] == -math.inf).all()
    close(actual[..., allowed], full[..., allowed], atol=1e-5)


# --- LoRA ---------------------------------------------------------------------------------------


@both_families
def test_policy_with_adapters_off_is_the_reference_before_and_after_training(family, saved_policy):
    reference = logits_of(load_reference(saved_policy(family), TOKENIZER))
    policy = add_lora(load_policy(saved_policy(family), TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    exact(logits_of(policy), reference)
    train_policy(policy)
    assert (logits_of(policy) - reference).abs().max() > 0.1
    with policy.disable_adapter():
        exact(logits_of(policy), reference)
    assert (logits_of(policy) - reference).abs().max() > 0.1


def test_adapters_are_drawn_from_their_seed(saved_policy):
    def adapters(seed):
        torch.manual_seed(99)
        model = add_lora(load_policy(saved_policy("llama"), TOKENIZER), LORA, "CAUSAL_LM", seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    exact(adapters(1), adapters(1))
    assert not torch.equal(adapters(1), adapters(2))


def test_adapters_alone_train_and_of_a_classifier_the_head_too(saved_policy):
    policy = add_lora(load_policy(saved_policy("llama"), TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    every, trained = parameter_count(policy)
    assert (
        every
        > trained
        == sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name)
    )
    model = init_reward_model(saved_policy("llama"), TOKENIZER, seed=3)
    model = add_lora(model, LORA, "SEQ_CLS", seed=0)
    rest = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert [name.split(".")[-4:-2] for name in rest] == [["score", "modules_to_save"]]


def test_unknown_lora_targets_are_an_input_error(saved_policy):
    config = PeftConfig(target_modules=["no_such_layer"])
    with pytest.raises(InputError, match=r"peft\.target_modules=\['no_such_layer'\]"):
        add_lora(load_policy(saved_policy("llama"), TOKENIZER), config, "CAUSAL_LM", seed=0)


@both_families
@pytest.mark.parametrize("tied", [False, True])
def test_merged_policy_equals_the_live_adapters_and_leaves_them_alone(family, tied, tmp_path):
    base = tiny_model(family, TOKENIZER, tie_word_embeddings=tied)
    live = add_lora(base, LORA, "CAUSAL_LM", seed=0)
    train_policy(live)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    logits = logits_of(live)
    plain = merged(live)
    assert type(plain).__name__ in ("LlamaForCausalLM", "GPTNeoXForCausalLM")
    close(logits_of(plain.eval()), logits, atol=1e-5)
    train_policy(plain, num_steps=1)  # shares nothing with the live model
    exact(dict(live.state_dict()), before)
    exact(logits_of(live), logits)
    loaded = load_policy(save(tmp_path / "final", merged(live)), TOKENIZER)
    close(logits_of(loaded), logits, atol=1e-5)


@both_families
def test_merged_reward_model_equals_the_live_adapters_and_loads_by_path(
    family, tmp_path, saved_policy
):
    live = add_lora(
        init_reward_model(saved_policy(family), TOKENIZER, seed=3), LORA, "SEQ_CLS", seed=0
    )
    fresh_head = live.get_base_model().score.weight.detach().clone()
    train_scores(live)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    scores = scores_of(live)
    plain = merged(live)
    assert not torch.equal(plain.score.weight, fresh_head)
    exact(dict(live.state_dict()), before)
    close(scores_of(plain), scores, atol=1e-5)
    loaded = load_reward_model(save(tmp_path / "reward", plain, "reward"))
    exact(scores_of(loaded), scores_of(plain))


@both_families
def test_merging_in_bfloat16_rounds_neither_head_nor_rotary_frequencies(family, saved_policy):
    half = ModelConfig(path=saved_policy(family).path, dtype="bfloat16")
    live = add_lora(init_reward_model(half, TOKENIZER, seed=3), LORA, "SEQ_CLS", seed=0)
    head = live.get_base_model().score.weight.detach().clone()
    plain = merged(live)
    assert plain.get_input_embeddings().weight.dtype == torch.bfloat16
    exact(plain.score.weight, head)
    exact(dict(plain.named_buffers()), dict(live.get_base_model().named_buffers()))
    exact(scores_of(plain), scores_of(live))  # fresh adapters change nothing


def test_merged_returns_a_plain_model_itself():
    model = tiny_model("llama", TOKENIZER)
    assert merged(model) is model


@both_families
def test_an_adapter_directory_loads_as_the_merged_model(family, tmp_path, saved_policy):
    base = load_policy(saved_policy(family), TOKENIZER)
    live = add_lora(base, LORA, "CAUSAL_LM", seed=0)
    train_policy(live)
    live.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == saved_policy(family).path
    config = ModelConfig(path=str(tmp_path / "adapter"))
    for loaded in (load_policy(config, TOKENIZER), load_reference(config, TOKENIZER)):
        close(logits_of(loaded), logits_of(live), atol=1e-5)
        assert not any("lora" in name for name, _ in loaded.named_parameters())


# --- Dropout and gradient checkpointing ----------------------------------------------------------


def model_with_dropout(family, lora):
    dropout = {"attention_dropout": 0.5}
    if family == "gpt_neox":
        dropout["hidden_dropout"] = 0.5
    model = tiny_model(family, TOKENIZER, attn_implementation="eager", **dropout)
    if lora:
        config = LoraConfig(
            r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False
        )
        torch.manual_seed(0)
        model = get_peft_model(model, config)
    return model.train()


@both_families
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_disable_dropout_reaches_every_dropout(family, lora, checkpointing):
    model = model_with_dropout(family, lora)
    assert not torch.equal(logits_of(model), logits_of(model))
    expected = logits_of(model.eval())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    disable_dropout(model)
    for training in (False, True):  # what a caller's train() does must not bring it back
        ids = torch.tensor([SEQUENCES[0]])
        exact(model(input_ids=ids, use_cache=False).logits, expected)
        exact(model(input_ids=ids, use_cache=False).logits, expected)
        if training is False:
            model.train()


def gradients_and_recomputations(model):
    """Gradients by name, and how often a layer's MLP was entered during the backward pass."""
    calls = {"forward": 0, "backward": 0}
    phase = "forward"
    layers = [m for m in model.modules() if type(m).__name__ in ("LlamaMLP", "GPTNeoXMLP")]
    assert len(layers) == 2
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.update({phase: calls[phase] + 1}))
    ids = torch.tensor([SEQUENCES[0]])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    phase = "backward"
    loss.backward()
    assert calls["forward"] == 2
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, calls["backward"]


@both_families
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_stays_active_without_dropout_and_gives_the_same_gradients(family, lora):
    plain = model_with_dropout(family, lora)
    disable_dropout(plain)
    expected, recomputed = gradients_and_recomputations(plain)
    assert recomputed == 0
    model = model_with_dropout(family, lora)
    model.gradient_checkpointing_enable()
    disable_dropout(model)
    actual, recomputed = gradients_and_recomputations(model)
    assert recomputed == 2
    assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
    close(actual, expected)


@both_families
def test_loaders_enable_gradient_checkpointing_when_asked(family, saved_policy, saved_reward_model):
    def config(source):
        return ModelConfig(path=source(family).path, gradient_checkpointing=True)

    assert load_policy(config(saved_policy), TOKENIZER).is_gradient_checkpointing
    assert init_reward_model(config(saved_policy), TOKENIZER, seed=0).is_gradient_checkpointing
    assert load_reward_model(config(saved_reward_model)).is_gradient_checkpointing
    assert not load_policy(saved_policy(family), TOKENIZER).is_gradient_checkpointing


# --- Reference ----------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("patched", [False, True])
def test_reference_does_not_follow_the_policy(family, patched, saved_policy):
    policy = load_policy(saved_policy(family), TOKENIZER)
    if patched:  # as a trainer does that wraps the loss head: `forward` on the instance
        original = policy.forward
        policy.forward = types.MethodType(lambda self, *a, **kw: original(*a, **kw), policy)
    reference = load_reference(saved_policy(family), TOKENIZER)
    assert not any(p.requires_grad for p in reference.parameters())
    shared = {p.data_ptr() for p in policy.parameters()}
    assert not shared & {p.data_ptr() for p in reference.parameters()}
    before = logits_of(reference)
    exact(logits_of(policy), before)
    train_policy(policy)
    assert (logits_of(policy) - before).abs().max() > 0.1
    exact(logits_of(reference), before)


def test_freeze_stops_gradients_and_dropout():
    model = freeze(model_with_dropout("gpt_neox", lora=False))
    assert not any(p.requires_grad for p in model.parameters())
    exact(logits_of(model), logits_of(model))


def test_a_policy_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)


@pytest.mark.parametrize("num_response", [1, 3, 12])
def test_a_frozen_copy_gives_bit_identical_logits(num_response):
    """torch multiplies a slice by a frozen weight otherwise than by one that trains."""
    policy = tiny_model("llama", TOKENIZER, hidden_size=128, intermediate_size=256)
    ids = torch.randint(3, 300, (64, 20), generator=torch.Generator().manual_seed(0))
    mask, forbidden = torch.ones_like(ids, dtype=torch.bool), torch.tensor([0])
    logits = []
    for trains in (True, False):
        policy.requires_grad_(trains)
        with torch.no_grad():
            logits.append(response_logits(policy, ids, mask, num_response, forbidden))
    assert torch.equal(*logits)


def test_ids_are_counted_up_to_the_largest_where_some_are_left_out():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "<eos>": 7}  # four tokens, but ids up to 7
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    assert num_tokens(tokenizer) == 8
    assert forbidden_token_ids(tokenizer, 10).tolist() == [0, 8, 9]  # EOS stays possible
