"""What every sampling engine must do: held against transformers, forward passes without a cache,
and values by hand. `test_engines.py` holds the engines against one another.

Run: pytest tests/sampling/test_generation.py
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from helpers.rows import user
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import get_tokenizer
from torch.testing import assert_close

from rlhf.data import encode_prompt, encode_response
from rlhf.functional import final_scores
from rlhf.models import disable_dropout
from rlhf.ppo.actors import Actors
from rlhf.ppo.rollout import Responses, policy_logprobs
from rlhf.ppo.scoring import score_sampled
from rlhf.sampling import Sampling, generate, stop_token_ids, stream, uniform_noise, use_engine
from rlhf.sampling.token_choice import choose, restrict
from rlhf.tokenizer import StopStrings, declare_stop_strings, forbidden_token_ids, response_text

FAMILIES = ("llama", "gpt_neox")
TOKENIZER = tiny_tokenizer()
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PROMPTS = [
    [40, 41, 42, 43, 44],
    [50],
    [60, 61, 62],
    [70, 71, 72, 73, 74, 75, 76],
    [80, 81],
    [90, 7],
]
BUDGET = 10
NONE_STOPS = (-1,)
MANY_STOPS = (EOS, *range(3, 320, 6))  # sampled responses stop at any step, and some never


ENGINES = [
    pytest.param({"name": "loop"}, id="loop"),
    pytest.param({"name": "graph", "check_every": 3}, id="graph"),
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, engine):
    model = tiny_model(request.param, TOKENIZER)
    use_engine(model, **engine)
    return model


@pytest.fixture(scope="module")
def llama(engine):
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, **engine)
    return model


def sampling_for(model, stop_ids=(EOS,), budget=BUDGET, **knobs):
    forbidden = forbidden_token_ids(TOKENIZER, model.config.vocab_size)
    return Sampling(budget, tuple(stop_ids), forbidden, **knobs)


def plain_logits(model, ids):
    """Logits after one unpadded sequence, without a cache; the pad token is forbidden. (V,)"""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return logits.index_fill(0, torch.tensor([PAD]), -math.inf)


def staggered_stop_ids(model):
    """Two ids at which greedy responses stop early: at different steps, and not all of them."""
    free = generate(model, PROMPTS, sampling_for(model, NONE_STOPS), noise=None).ids
    candidates = [(free[0][2], free[1][5]), (free[3][1], free[2][4]), (free[4][0], free[5][6])]
    for stops in candidates:
        ends = [next((t for t, i in enumerate(row) if i in stops), None) for row in free]
        if None in ends and len(set(ends)) >= 3:
            return stops
    raise AssertionError(f"choose another seed: {free}")


# --- Greedy decoding ----------------------------------------------------------------------------


def test_greedy_equals_transformers_generate_token_by_token(model):
    stops = staggered_stop_ids(model)
    ours = generate(model, PROMPTS, sampling_for(model, stops), noise=None)
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = model.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=BUDGET,
        eos_token_id=list(stops),
        pad_token_id=PAD,
        suppress_tokens=[PAD],
    )[:, width:].tolist()
    # After its stop token a row of theirs is padded; pad itself is suppressed before it.
    assert ours.ids == [[i for i in row if i != PAD] for row in theirs]


def test_a_response_ends_with_its_stop_token_and_is_finished_only_then(model):
    stops = staggered_stop_ids(model)
    result = generate(model, PROMPTS, sampling_for(model, stops), noise=None)
    assert {True, False} == set(result.finished)
    for ids, logprobs, finished in zip(result.ids, result.logprobs, result.finished, strict=True):
        assert len(ids) == len(logprobs)
        assert not set(ids[:-1]) & set(stops)
        assert finished == (ids[-1] in stops)
        assert finished or len(ids) == BUDGET


def test_each_of_several_stop_ids_ends_a_response(llama):
    free = generate(llama, PROMPTS, sampling_for(llama, NONE_STOPS), noise=None).ids
    stops = (free[0][3], free[3][2])
    both = generate(llama, PROMPTS, sampling_for(llama, stops), noise=None)
    assert {row[-1] for row, done in zip(both.ids, both.finished, strict=True) if done} == {*stops}


def test_a_stop_token_that_uses_up_the_budget_counts_as_finished(llama):
    free = generate(llama, [PROMPTS[0]], sampling_for(llama, NONE_STOPS), noise=None).ids[0]
    budget = next(t for t in range(1, BUDGET) if free[t] not in free[:t]) + 1
    sampling = sampling_for(llama, (free[budget - 1],), budget=budget)
    result = generate(llama, [PROMPTS[0]], sampling, noise=None)
    assert result.ids == [free[:budget]] and result.finished == [True]


def test_no_prompts_give_no_responses(llama):
    noise = uniform_noise((0,), [], BUDGET)
    assert generate(llama, [], sampling_for(llama), noise).ids == []


def test_stop_ids_are_the_eos_and_those_of_the_generation_config():
    model = tiny_model("llama", TOKENIZER)
    model.generation_config.eos_token_id = [EOS, 300]
    assert stop_token_ids(model, TOKENIZER) == (EOS, 300)
    model.generation_config.eos_token_id = 300
    assert stop_token_ids(model, TOKENIZER) == (EOS, 300)
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, TOKENIZER) == (EOS,)


# --- Sampling against slow and independent paths -------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_equal_those_of_the_training_forward(model, temperature):
    sampling = sampling_for(model, MANY_STOPS, temperature=temperature)
    sampled = generate(model, PROMPTS, sampling, uniform_noise((3,), range(6), BUDGET))
    rollout = Responses.padded(PROMPTS, sampled, PAD, torch.device("cpu"))
    with torch.no_grad():
        logprobs, _ = policy_logprobs(model, rollout, sampling)
    mask = rollout.response_mask
    assert_close(rollout.sampler_logprobs[mask], logprobs[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_is_the_inverse_cdf_of_its_own_draw(model, temperature):
    noise = uniform_noise((5, 1), range(6), BUDGET)
    sampled = generate(
        model, PROMPTS, sampling_for(model, MANY_STOPS, temperature=temperature), noise
    )
    for prompt, ids, logprobs, draws in zip(
        PROMPTS, sampled.ids, sampled.logprobs, noise.tolist(), strict=True
    ):
        for t, token in enumerate(ids):
            probs = (plain_logits(model, prompt + ids[:t]).double() / temperature).softmax(-1)
            below, upto = probs[:token].sum().item(), probs[: token + 1].sum().item()
            assert below - 1e-6 <= draws[t] <= upto + 1e-6
            assert_close(logprobs[t], probs[token].log().item(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_frequencies_follow_the_softmax(model, temperature):
    num_rows, prompt = 4000, PROMPTS[0]
    sampling = sampling_for(model, budget=1, temperature=temperature)
    noise = uniform_noise((11,), range(num_rows), 1)
    sampled = generate(model, [prompt] * num_rows, sampling, noise, batch_size=num_rows)
    counts = torch.bincount(torch.tensor(sampled.ids).flatten(), minlength=320).double()
    expected = (plain_logits(model, prompt).double() / temperature).softmax(-1) * num_rows
    assert counts[PAD] == 0
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom >= 10
    # Mean and variance of chi-square are df and 2 df.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_forbidden_tokens_are_never_sampled_even_when_they_are_the_likeliest():
    model = tiny_model("llama", TOKENIZER, vocab_size=330)
    favoured = torch.tensor([PAD, 325])
    with torch.no_grad():
        model.get_output_embeddings().weight[favoured] *= 10
    free = Sampling(BUDGET, NONE_STOPS, torch.empty(0, dtype=torch.long))
    noise = uniform_noise((2,), range(64), BUDGET)
    prompts = PROMPTS[:4] * 16
    assert {PAD, 325} <= {i for row in generate(model, prompts, free, noise).ids for i in row}
    sampled = generate(model, prompts, sampling_for(model, NONE_STOPS), noise)
    greedy = generate(model, prompts, sampling_for(model, NONE_STOPS), None)
    for row in sampled.ids + greedy.ids:
        assert PAD not in row and max(row) < 320


def test_extreme_draws_never_choose_a_token_of_probability_zero():
    # Ids 0 and 3 are forbidden: the first and the last step of the cdf are flat.
    logits = torch.tensor([[5.0, 0.0, 1.0, 5.0]])
    forbidden = torch.tensor([0, 3])
    sampling = Sampling(1, (), forbidden)
    for draw, expected in ((0.0, 1), (1 - 2**-53, 2)):
        noise = torch.tensor([draw], dtype=torch.float64)
        token, logprob = choose(logits, sampling, forbidden, noise)
        assert token.item() == expected
        close = math.log(1 / (1 + math.e)) if expected == 1 else math.log(math.e / (1 + math.e))
        assert math.isclose(logprob.item(), close, rel_tol=1e-6)


# --- Stop strings ---------------------------------------------------------------------------------


def stopping_at(tokenizer, *stops):
    """The tokenizer, with a template that declares these stop strings."""
    tokenizer.chat_template = declare_stop_strings("{{ messages }}", stops)
    return tokenizer


def first_end(ids, tokenizer, stops):
    """Length of the shortest prefix whose text contains a stop string; None where none does."""
    for t in range(1, len(ids) + 1):
        text = tokenizer.decode(
            ids[:t], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if any(stop in text for stop in stops):
            return t
    return None


STOPS = [
    ("\nUser",),
    ("[|Human|]",),
    ("### End",),
    ("é", "🙂!"),
    ("本", " a", "\n\n"),
    ("x ", "\u00e9\u00e9"),
]


@pytest.mark.parametrize("name", ["byte", "pythia", "llama"])
@pytest.mark.parametrize("stops", STOPS)
def test_stop_string_is_seen_at_the_first_token_that_completes_it(name, stops):
    """Against decoding every prefix: on random ids, pieces of stop strings and of characters."""
    tokenizer = stopping_at(get_tokenizer(name), *stops)
    watch, random_ids = StopStrings(tokenizer), random.Random(0)
    pieces = [*stops, *(stop[:n] for stop in stops for n in range(len(stop))), "Users", "é", "🙂"]
    pieces += ["日本", "\n", " ", "a\n", "x", "# End", "Human|]", tokenizer.eos_token]
    found = set()
    for _ in range(150):
        ids = []
        for _ in range(12):
            if random_ids.random() < 0.3:
                ids.append(random_ids.randrange(len(tokenizer)))
            else:  # in one go, or character by character, or cut within a character
                piece = random_ids.choice(pieces)
                units = random_ids.choice([[piece], list(piece)])
                more = [i for u in units for i in tokenizer(u, add_special_tokens=False).input_ids]
                ids += more[: random_ids.randint(1, len(more))] if more else []
        expected = first_end(ids, tokenizer, stops)
        ends = [t for t in range(1, len(ids) + 1) if watch.end(ids[:t])]
        assert (ends[0] if ends else None) == expected, ids
        found.add(expected is not None)
    assert found == {True, False}


def pair_of(ids):
    """The characters on both sides of a border between two sampled tokens."""
    texts = [TOKENIZER.decode([token], skip_special_tokens=True) for token in ids]
    pairs = (a[-1:] + b[:1] for a, b in zip(texts[2:], texts[3:], strict=False) if a and b)
    return next(pair for pair in pairs if pair.isascii() and pair.isprintable())


def with_stop_strings(sampling, *stops):
    return replace(sampling, stop_strings=StopStrings(stopping_at(tiny_tokenizer(), *stops)))


@pytest.mark.parametrize("batch_size", [2, 64])
def test_rows_end_where_their_text_has_a_stop_string(model, batch_size):
    noise = uniform_noise((8,), range(6), 40)
    free = generate(model, PROMPTS, sampling_for(model, budget=40), noise)
    stops = (pair_of(free.ids[0]), pair_of(free.ids[3]))
    sampling = with_stop_strings(sampling_for(model, budget=40), *stops)
    result = generate(model, PROMPTS, sampling, noise, batch_size)
    ends = [first_end(ids, TOKENIZER, stops) for ids in free.ids]
    assert len({*ends}) >= 3 and None in ends
    assert result.ids == [ids[:end] for ids, end in zip(free.ids, ends, strict=True)]
    for row, end in enumerate(ends):
        assert result.finished[row] == (end is not None or free.finished[row])
        assert_close(result.logprobs[row], free.logprobs[row][:end], rtol=1e-5, atol=1e-5)
        streamed = list(stream(model, PROMPTS[row], sampling, noise[row : row + 1]))
        assert streamed == result.ids[row]


def test_stop_string_across_the_border_of_the_prompt_ends_nothing(llama):
    sampling = sampling_for(llama, NONE_STOPS)
    free = generate(llama, PROMPTS, sampling, noise=None)
    for prompt, ids in zip(PROMPTS, free.ids, strict=True):
        across = TOKENIZER.decode([prompt[-1], ids[0]])
        within = TOKENIZER.decode(prompt)
        assert across not in TOKENIZER.decode(ids) and within not in TOKENIZER.decode(ids)
        same = generate(llama, [prompt], with_stop_strings(sampling, across, within), noise=None)
        assert same.ids == [ids] and same.finished == [False]


def test_response_ended_by_a_stop_string_is_scored_whole_and_not_penalised(llama):
    """Its score is at the stop string's last token; the scorer's text ends before it."""
    noise = uniform_noise((8,), range(6), 40)
    free = generate(llama, PROMPTS, sampling_for(llama, NONE_STOPS, budget=40), noise)
    stop = pair_of(free.ids[0])
    tokenizer = stopping_at(tiny_tokenizer(), stop)
    sampling = with_stop_strings(sampling_for(llama, NONE_STOPS, budget=40), stop)
    sampled = generate(llama, PROMPTS, sampling, noise)
    assert {True, False} == set(sampled.finished)
    given = []

    def scorer(prompts, responses):
        given.extend(responses)
        return [float(len(text)) for text in responses]

    prompts = [{"prompt": "a", "input_ids": ids} for ids in PROMPTS]
    actors = Actors(llama, None, None, scorer, tokenizer, "")
    raw = score_sampled(actors, prompts, sampled.ids).total
    scores = final_scores(raw, torch.tensor(sampled.finished), -1.0)
    for text, ids, ended, score in zip(given, sampled.ids, sampled.finished, scores, strict=True):
        whole = TOKENIZER.decode(ids, skip_special_tokens=True)
        assert (stop in whole) == ended and text == whole.split(stop)[0].rstrip()
        assert float(score) == (len(text) if ended else -1.0)
    rollout = Responses.padded(PROMPTS, sampled, PAD, torch.device("cpu"))
    assert rollout.lengths.tolist() == [len(ids) for ids in sampled.ids]
    row = sampled.finished.index(True)
    last = rollout.response_ids[row, rollout.lengths[row] - 1]
    assert stop in TOKENIZER.decode(rollout.response_ids[row, : rollout.lengths[row]])
    assert stop[-1] in TOKENIZER.decode([last]) and len(sampled.ids[row]) < 40


@pytest.mark.parametrize("template", ["baize", "falcon", "dolly"])
def test_what_training_ends_an_answer_with_ends_a_sampled_one(template):
    tokenizer = get_tokenizer("byte", template)
    ids = encode_response([user("Hi")], "It is\n\na fruit.", tokenizer)
    watch = StopStrings(tokenizer)
    assert [watch.end(ids[:t]) for t in range(1, len(ids) + 1)] == [*[False] * (len(ids) - 1), True]
    assert tokenizer.eos_token_id not in ids
    said = response_text(ids, tokenizer)
    later = [user("Hi"), {"role": "assistant", "content": said}, user("a")]
    start = encode_prompt(later[:1], tokenizer) + ids
    assert encode_prompt(later, tokenizer)[: len(start)] == start


# --- Random numbers and batches ------------------------------------------------------------------


def test_noise_depends_on_key_and_row_alone():
    noise = uniform_noise((7, 3), range(4), 50)
    assert noise.shape == (4, 50) and noise.dtype == torch.float64
    assert (noise >= 0).all() and (noise < 1).all()
    assert torch.equal(noise, uniform_noise((7, 3), range(4), 50))
    assert torch.equal(noise[[2, 0]], uniform_noise((7, 3), [2, 0], 50))
    assert len(set(noise.flatten().tolist())) == 200
    for key in ((7, 4), (8, 3), (3, 7)):
        assert not (uniform_noise(key, range(4), 50) == noise).any()
    assert uniform_noise((7, 3), [], 50).shape == (0, 50)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_responses_do_not_depend_on_the_batch_size(model, batch_size):
    sampling = sampling_for(model, MANY_STOPS)
    noise = uniform_noise((4,), range(6), BUDGET)
    whole = generate(model, PROMPTS, sampling, noise, batch_size=64)
    parts = generate(model, PROMPTS, sampling, noise, batch_size=batch_size)
    assert len({len(row) for row in whole.ids}) >= 3  # rows leave the batch at different steps
    assert parts.ids == whole.ids and parts.finished == whole.finished
    for part, row in zip(parts.logprobs, whole.logprobs, strict=True):
        assert_close(part, row, rtol=1e-5, atol=1e-5)


def test_responses_do_not_depend_on_the_order_of_rows(model):
    sampling = sampling_for(model, MANY_STOPS)
    rows = [3, 5, 0, 4, 2, 1]
    whole = generate(model, PROMPTS, sampling, uniform_noise((4,), range(6), BUDGET))
    mixed = generate(
        model, [PROMPTS[i] for i in rows], sampling, uniform_noise((4,), rows, BUDGET), 4
    )
    assert mixed.ids == [whole.ids[i] for i in rows]
    assert mixed.finished == [whole.finished[i] for i in rows]


def test_one_prompt_with_different_noise_gives_different_responses(llama):
    noise = uniform_noise((1,), range(8), BUDGET)
    sampled = generate(llama, [PROMPTS[0]] * 8, sampling_for(llama, NONE_STOPS), noise)
    assert len({tuple(row) for row in sampled.ids}) == 8


# --- top_k and top_p -----------------------------------------------------------------------------

# Sorted: id 1 (0.5), 3 (0.25), 0 (0.125), then 2 and 4.
FIVE = torch.tensor([[0.125, 0.5, 0.075, 0.25, 0.05]])


def kept(**knobs):
    sampling = Sampling(1, (), torch.empty(0, dtype=torch.long), **knobs)
    restricted = restrict(FIVE.log(), sampling)[0]
    support = restricted.isfinite()
    assert_close(restricted[support], FIVE.log()[0][support], rtol=0, atol=0)
    return support.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("knobs", "support"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        *(({"top_p": share}, [1]) for share in (0.0, 0.01, 0.49)),
        ({"top_p": 0.51}, [1, 3]),  # the token that crosses the bound stays
        ({"top_p": 0.74}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"top_p": 0.94}, [0, 1, 2, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
        # Of the three left, id 1 has 0.5 / 0.875 = 0.571: top_p counts after top_k.
        ({"top_k": 3, "top_p": 0.56}, [1]),
        ({"top_k": 3, "top_p": 0.58}, [1, 3]),
    ],
)
def test_restrict_keeps_the_smallest_likeliest_set(knobs, support):
    assert kept(**knobs) == support


def test_top_p_that_is_reached_exactly_adds_no_further_token():
    halves = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]).log()
    sampling = Sampling(1, (), torch.empty(0, dtype=torch.long), top_p=0.5)
    assert restrict(halves, sampling).isfinite().sum() == 1


@pytest.mark.parametrize("knobs", [{"top_k": 4}, {"top_p": 0.5}])
def test_restricted_sampling_keeps_the_logprobs_of_the_full_distribution(llama, knobs):
    prompt, num_rows = PROMPTS[0], 1000
    sampling = sampling_for(llama, budget=1, temperature=0.7, **knobs)
    noise = uniform_noise((6,), range(num_rows), 1)
    sampled = generate(llama, [prompt] * num_rows, sampling, noise, batch_size=num_rows)
    logprobs = (plain_logits(llama, prompt) / 0.7).log_softmax(-1)
    ranked = logprobs.argsort(descending=True).tolist()
    mass = logprobs[ranked].exp().cumsum(0)
    size = knobs.get("top_k") or int((mass < knobs["top_p"]).sum()) + 1
    assert {row[0] for row in sampled.ids} == set(ranked[:size])
    actual = torch.tensor(sampled.logprobs).flatten()
    assert_close(actual, logprobs[torch.tensor(sampled.ids).flatten()], rtol=1e-5, atol=1e-5)


# --- The model is left as it was ----------------------------------------------------------------


def test_training_flags_come_back_also_after_an_error(llama):
    llama.train()
    llama.model.layers[1].eval()
    flags = [module.training for module in llama.modules()]
    generate(llama, PROMPTS, sampling_for(llama), noise=None)
    assert [module.training for module in llama.modules()] == flags
    with pytest.raises(IndexError):
        generate(llama, [[10**6]], sampling_for(llama), noise=None)
    assert [module.training for module in llama.modules()] == flags
    llama.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_and_dropout_change_no_response(family):
    plain = tiny_model(family, TOKENIZER)
    model = tiny_model(family, TOKENIZER, attention_dropout=0.5)
    noise = uniform_noise((9,), range(6), BUDGET)
    expected = generate(plain, PROMPTS, sampling_for(plain), noise).ids
    model.gradient_checkpointing_enable()
    model.train()
    assert generate(model, PROMPTS, sampling_for(model), noise).ids == expected
    disable_dropout(model)
    assert generate(model, PROMPTS, sampling_for(model), noise).ids == expected
