"""What every model family must hold: padding, saving, sampling, adapters, embeddings, dropout.

Tiny models of each family, built and saved offline; a family that breaks a contract is mended in
the package by what its config and signatures say, never by its name. Leaves out the stages on each
family (test_recipes.py) and quantised models (test_quantization.py).
Run: pytest tests/models/test_families.py
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers.families import (
    BLOCKS,
    EOS,
    LORA,
    NONE_FORBIDDEN,
    PAD,
    PROMPTS,
    RESPONSES,
    SEQUENCES,
    TOKENIZER,
    VOCAB,
    close,
    every_family,
    exact,
    logits_of,
    near,
    padded,
    positions_before_last,
    response_logits,
    rollout_of,
    save,
    scores_of,
    train_policy,
    train_scores,
)
from helpers.tiny import tiny_model

from rlhf.config import InputError, PeftConfig
from rlhf.functional import token_logprobs
from rlhf.models import (
    ScalarModel,
    add_lora,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    merged,
    prefill_inputs,
    resize_embeddings,
    sequence_scores,
)
from rlhf.ppo.rollout import critic_values, policy_logprobs
from rlhf.sampling import Sampling, generate, uniform_noise
from rlhf.scorers import score_sequences
from rlhf.tokenizer import forbidden_token_ids


@pytest.fixture(scope="module")
def saved_reward_model(tmp_path_factory, saved_policy):
    """family -> ModelConfig of a saved reward model, with the head as it was initialised."""
    folder = tmp_path_factory.mktemp("reward_models")

    def fresh(family):
        return init_reward_model(saved_policy(family), TOKENIZER, seed=3)

    return functools.cache(lambda family: save(folder / family, fresh(family), "reward"))


# --- Padding ------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_logprobs_do_not_depend_on_padding(family, side):
    """Rows are right-padded in training, left-padded in the sampler."""
    model = tiny_model(family, TOKENIZER)

    @torch.no_grad()
    def logprobs(ids, mask):
        if side == "left":
            logits = model(**prefill_inputs(model, ids, mask)).logits[:, :-1]
        else:
            positions = positions_before_last(ids, ids.shape[1] - 1)
            logits = response_logits(model, ids, mask, positions, NONE_FORBIDDEN)
        return token_logprobs(logits, ids[:, 1:])

    # Any fill will do: masked positions are not read.
    ids, mask = padded(SEQUENCES, side, fill=77)
    # A token can be predicted where it and the one before it are valid.
    predicted = mask[:, 1:] & mask[:, :-1]
    batch = logprobs(ids, mask)
    for row, sequence in enumerate(SEQUENCES):
        alone = logprobs(*padded([sequence], side))[0]
        close(batch[row][predicted[row]], alone, atol=1e-5)


@every_family
def test_values_and_scores_do_not_depend_on_padding(family, saved_reward_model):
    model = ScalarModel(load_reward_model(saved_reward_model(family)), mean=0.2, std=1.5).eval()
    ids, mask = padded(SEQUENCES, "right", fill=77)
    with torch.no_grad():
        batch, scores = model(ids, mask), sequence_scores(model, ids, mask)
        for row, sequence in enumerate(SEQUENCES):
            alone = model(*padded([sequence], "right"))[0]
            near(batch[row][mask[row]], alone)
            near(scores[row], alone[-1])
    near(score_sequences(model, SEQUENCES, batch_size=2), scores)


@every_family
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
            close(logprobs[row][valid], expected, atol=1e-5)
            near(values[row][valid], critic(ids, torch.ones_like(ids).bool())[0, start:end])


# --- Sampling -----------------------------------------------------------------------------------


@every_family
def test_sampled_logprobs_are_those_of_the_training_forward(family):
    """Rows end at different times, so that the cache drops some while others go on."""
    # Untied: a tied Gemma, whose embeddings are scaled up, only repeats its last token.
    policy = tiny_model(family, TOKENIZER, tie_word_embeddings=False)
    stop = tuple(range(3, VOCAB, 6))
    sampling = Sampling(12, stop, forbidden_token_ids(TOKENIZER, VOCAB), temperature=2.0)
    prompts = PROMPTS * 4
    sampled = generate(policy, prompts, sampling, uniform_noise((1,), range(12), 12))
    lengths = [len(ids) for ids in sampled.ids]
    assert len(set(lengths)) > 3 and max(lengths) > 6
    rollout = rollout_of(prompts, sampled.ids)
    with torch.no_grad():
        logprobs, _ = policy_logprobs(policy, rollout, sampling)
    for row, expected in enumerate(sampled.logprobs):
        close(logprobs[row][rollout.response_mask[row]], torch.tensor(expected), atol=1e-4)


# --- Saving and loading -------------------------------------------------------------------------


@every_family
def test_saved_policy_loads_by_path_with_identical_logits(family, saved_policy):
    exact(
        logits_of(load_policy(saved_policy(family), TOKENIZER)),
        logits_of(tiny_model(family, TOKENIZER)),
    )


@every_family
def test_saved_reward_model_loads_with_identical_scores(family, tmp_path, saved_policy):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    train_scores(model)
    config = save(tmp_path / "reward", model, "reward")
    exact(scores_of(load_reward_model(config)), scores_of(model))


@every_family
def test_reward_model_scores_are_head_times_hidden_state(family, saved_policy):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    policy = tiny_model(family, TOKENIZER)
    with torch.no_grad():
        for sequence, score in zip(SEQUENCES, scores_of(model), strict=True):
            hidden = policy.base_model(torch.tensor([sequence])).last_hidden_state[0, -1]
            close(score, hidden @ model.score.weight[0], atol=1e-5)


# --- Embedding tables ---------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_both_tables_are_the_mean_of_the_old(family, tied):
    model = tiny_model(family, TOKENIZER, tie_word_embeddings=tied)
    tables = [model.get_input_embeddings, model.get_output_embeddings]
    before = [table().weight.detach().clone() for table in tables]
    logits = logits_of(model)
    resize_embeddings(model, VOCAB + 3)
    assert model.config.vocab_size == VOCAB + 3
    for table, old in zip(tables, before, strict=True):
        weight = table().weight
        exact(weight[:VOCAB], old)
        close(weight[VOCAB:], old.mean(dim=0).expand(3, -1))
    assert (tables[0]().weight is tables[1]().weight) == tied
    if not tied:
        assert not torch.equal(before[0], before[1])
    bias = getattr(model.get_output_embeddings(), "bias", None)  # GPT-J
    if bias is not None:
        close(bias[VOCAB:], bias[:VOCAB].mean().expand(3))
    exact(logits_of(model)[..., :VOCAB], logits)


# --- LoRA ---------------------------------------------------------------------------------------


@every_family
def test_policy_with_adapters_off_is_the_reference_before_and_after_training(family, saved_policy):
    reference = logits_of(load_reference(saved_policy(family), TOKENIZER))
    policy = add_lora(load_policy(saved_policy(family), TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    exact(logits_of(policy), reference)
    train_policy(policy)
    assert (logits_of(policy) - reference).abs().max() > 0.1
    with policy.disable_adapter():
        exact(logits_of(policy), reference)
    assert (logits_of(policy) - reference).abs().max() > 0.1


@every_family
def test_merged_policy_equals_the_live_adapters_and_leaves_them_alone(family, tmp_path):
    base = tiny_model(family, TOKENIZER)
    live = add_lora(base, LORA, "CAUSAL_LM", seed=0)
    train_policy(live)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    logits = logits_of(live)
    plain = merged(live)
    assert type(plain) is type(base)
    close(logits_of(plain.eval()), logits, atol=1e-4)
    train_policy(plain, num_steps=1)  # shares nothing with the live model
    exact(dict(live.state_dict()), before)
    exact(logits_of(live), logits)
    loaded = load_policy(save(tmp_path / "final", merged(live)), TOKENIZER)
    close(logits_of(loaded), logits, atol=1e-4)


@every_family
def test_merged_reward_model_equals_the_live_adapters_and_loads_by_path(
    family, tmp_path, saved_policy
):
    model = init_reward_model(saved_policy(family), TOKENIZER, seed=3)
    live = add_lora(model, LORA, "SEQ_CLS", seed=0)
    fresh_head = live.get_base_model().score.weight.detach().clone()
    train_scores(live)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    scores = scores_of(live)
    plain = merged(live)
    assert not torch.equal(plain.score.weight, fresh_head)
    exact(dict(live.state_dict()), before)
    close(scores_of(plain), scores, atol=1e-4)
    loaded = load_reward_model(save(tmp_path / "reward", plain, "reward"))
    exact(scores_of(loaded), scores_of(plain))


@every_family
def test_all_linear_layers_are_those_of_the_blocks(family):
    """Found by the shape of their weights: a matrix outside embeddings and head."""
    policy = tiny_model(family, TOKENIZER)
    expected = {
        name.removesuffix(".weight")
        for name, parameter in policy.named_parameters()
        if parameter.dim() == 2 and BLOCKS[family] in enclosing(policy, name)
    }
    assert len(expected) >= 8
    for task_type in ("CAUSAL_LM", "SEQ_CLS"):
        model = policy if task_type == "CAUSAL_LM" else classifier_of(policy)
        live = add_lora(model, LORA, task_type, seed=0)
        assert targets_of(live) == expected


def enclosing(model, name):
    """Class names of the modules that a parameter lies in."""
    parts = name.split(".")
    return {type(model.get_submodule(".".join(parts[:n]))).__name__ for n in range(len(parts))}


def classifier_of(policy):
    from transformers import AutoModelForSequenceClassification

    config = type(policy.config)(**policy.config.to_dict() | {"num_labels": 1})
    return AutoModelForSequenceClassification.from_config(config)


def targets_of(live):
    base = live.get_base_model()
    return {name for name, module in base.named_modules() if hasattr(module, "lora_A")}


QUERY_AND_VALUE = "llama gptj opt qwen3 mistral gemma gemma2 gemma3".split()
PUBLISHED = dict.fromkeys(QUERY_AND_VALUE, ["q_proj", "v_proj"]) | {
    "gpt_neox": ["query_key_value"],
    "falcon_7b": ["query_key_value"],
    "falcon_40b": ["query_key_value"],
    "gpt2": ["c_attn"],
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_targets_of_published_recipes_are_found_in_every_block(family):
    names = PUBLISHED[family]
    config = PeftConfig(enabled=True, r=4, target_modules=names)
    live = add_lora(tiny_model(family, TOKENIZER), config, "CAUSAL_LM", seed=0)
    assert sorted(name.rpartition(".")[2] for name in targets_of(live)) == sorted(names * 2)


LINEAR_LAYERS = {
    "llama": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    "gpt_neox": "query_key_value, dense, dense_h_to_4h, dense_4h_to_h",
    "gpt2": "c_attn, c_proj, c_fc",
}


@pytest.mark.parametrize("family", LINEAR_LAYERS)
@pytest.mark.parametrize("wrong", ["no_such_layer", "lm_head", "proj"])
def test_a_wrong_target_is_an_input_error_that_names_the_linear_layers(family, wrong):
    right = PUBLISHED[family]
    config = PeftConfig(enabled=True, target_modules=[*right, wrong])
    with pytest.raises(InputError) as caught:
        add_lora(tiny_model(family, TOKENIZER), config, "CAUSAL_LM", seed=0)
    assert str(caught.value).startswith(f"peft.target_modules={[*right, wrong]}: ")
    assert f"has no linear layer named {wrong}; it has {LINEAR_LAYERS[family]} (null: all of " in (
        str(caught.value)
    )


# --- Wrap units ---------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("kind", ["policy", "reward model"])
@pytest.mark.parametrize("lora", [False, True])
def test_accelerate_shards_by_decoder_block_without_being_told(family, kind, lora):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = tiny_model(family, TOKENIZER)
    if kind == "reward model":
        model = classifier_of(model)
    if lora:
        model = add_lora(model, LORA, "SEQ_CLS" if kind == "reward model" else "CAUSAL_LM", 0)
    if kind == "reward model":
        model = ScalarModel(model)
    make = functools.partial(
        FullyShardedDataParallelPlugin, auto_wrap_policy="transformer_based_wrap"
    )
    wraps = fsdp2_prepare_auto_wrap_policy(make(fsdp_version=2), model)
    wrapped = [type(module).__name__ for module in model.modules() if wraps(module)]
    assert wrapped == [BLOCKS[family]] * 2
    first = make(fsdp_version=1)
    first.set_auto_wrap_policy(model)
    classes = first.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert [c.__name__ for c in classes] == [BLOCKS[family]]
