"""Tests of rlhf.functional.reward_loss against explicit loops and closed forms.

Run: pytest tests/functional/test_reward_loss.py
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tensors import GARBAGE, INF, NAN, close, draw, exact, few, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from rlhf import functional as F

# ranking_loss


def ranking_loss_by_loops(
    scores, ranks, groups, margin, kind, targets=None, smoothing=0.0, center_coef=0.0
):
    """Return loss, number of pairs, share ordered right, mean lead; scores in float64."""
    group_losses, pairs, right, leads = [], 0, 0.0, 0.0
    for group in sorted(set(groups.tolist())):
        members = [i for i in range(len(scores)) if groups[i] == group]
        terms, centers = [], []
        for i in members:
            worse = [j for j in members if ranks[i] < ranks[j]]
            rivals = []
            for j in worse:
                lead = scores[i] - scores[j]
                rivals.append(torch.exp(scores[j] + margin[i, j] - scores[i]))
                centers.append((scores[i] + scores[j]) ** 2)
                pairs, leads = pairs + 1, leads + lead.item()
                right += 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
                if kind == "pairwise":
                    p = 1.0 if targets is None else float(targets[i, j])
                    p = p * (1 - smoothing) + (1 - p) * smoothing
                    odds = rivals[-1]  # that the worse one wins
                    terms.append(p * torch.log(1 + odds) + (1 - p) * torch.log(1 + 1 / odds))
            if kind == "plackett_luce" and worse:
                terms.append(torch.log(1 + sum(rivals)))
        if terms:
            center = sum(centers) / len(centers)
            group_losses.append(sum(terms) / len(terms) + center_coef * center)
    return sum(group_losses) / len(group_losses), pairs, right / pairs, leads / pairs


def draw_ranked(seed, num_items):
    """Scores, ranks and groups: some scores are equal, some responses tied, at least one pair."""
    generator = torch.Generator().manual_seed(seed)
    scores = (4 * draw(seed, num_items)).round() / 2
    ranks = torch.randint(4, (num_items,), generator=generator)
    groups = torch.randint(-1, 3, (num_items,), generator=generator) * 10
    ranks[:2], groups[:2] = torch.tensor([0, 1]), groups[0]
    return scores, ranks, groups


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
@few
@given(
    seed=seeds,
    num_items=st.integers(2, 12),
    margin=st.sampled_from(["none", "float", "matrix"]),
    center_coef=st.sampled_from([0.0, 0.3]),
)
def test_ranking_loss_equals_explicit_loops(kind, seed, num_items, margin, center_coef):
    scores, ranks, groups = draw_ranked(seed, num_items)
    given_margin, matrix = None, torch.zeros(num_items, num_items)
    if margin == "float":
        given_margin, matrix = 0.3, torch.full_like(matrix, 0.3)
    elif margin == "matrix":
        given_margin = matrix = draw(seed + 1, num_items, num_items).double()
    ours, theirs = leaf(scores), leaf(scores.double())
    loss, stats = F.ranking_loss(ours, ranks, groups, given_margin, kind, center_coef=center_coef)
    reference, pairs, right, lead = ranking_loss_by_loops(
        theirs, ranks, groups, matrix, kind, center_coef=center_coef
    )
    loss.backward()
    reference.backward()
    close(loss.detach(), reference.detach())
    close(ours.grad, theirs.grad)
    close(stats["num_pairs"], pairs)
    close(stats["accuracy"], right)
    close(stats["margin"], lead)


@few
@given(
    seed=seeds,
    num_items=st.integers(2, 8),
    smoothing=st.sampled_from([0.0, 0.1, 0.49]),
    soft=st.sampled_from(["no", "per response", "per pair"]),
    center_coef=st.sampled_from([0.0, 2.0]),
)
def test_soft_and_smoothed_labels_equal_explicit_loops(
    seed, num_items, smoothing, soft, center_coef
):
    scores, ranks, groups = draw_ranked(seed, num_items)
    margin = draw(seed + 1, num_items, num_items)
    targets = matrix = None
    if soft != "no":
        targets = torch.sigmoid(3 * draw(seed + 2, num_items, num_items))
        targets = targets[:, :1] if soft == "per response" else targets
        matrix = targets.expand(num_items, num_items)
    ours, theirs = leaf(scores), leaf(scores.double())
    options = {"label_smoothing": smoothing, "center_coef": center_coef}
    loss, _ = F.ranking_loss(ours, ranks, groups, margin, targets=targets, **options)
    reference, *_ = ranking_loss_by_loops(
        theirs, ranks, groups, margin.double(), "pairwise", matrix, smoothing, center_coef
    )
    loss.backward()
    reference.backward()
    close(loss.detach(), reference.detach())
    close(ours.grad, theirs.grad)


def test_ranking_loss_of_one_pair_prefers_the_lower_rank():
    scores = leaf(torch.tensor([0.0, 2.0]))
    loss, stats = F.ranking_loss(scores, torch.tensor([1, 0]), torch.tensor([7, 7]))
    loss.backward()
    close(loss.detach(), math.log(1 + math.exp(-2)))
    assert scores.grad[1] < 0 < scores.grad[0]  # descent raises the better one
    close(stats["accuracy"], 1.0)
    close(stats["margin"], 2.0)


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    # Prompt 0: six pairs of loss log 2. Prompt 1: one pair of loss log 4. Prompt 2: tied, left out.
    scores = torch.tensor([0.0, 0, 0, 0, -math.log(3), 0, 9, -9])
    ranks, groups = torch.tensor([0, 1, 2, 3, 0, 1, 5, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    loss, stats = F.ranking_loss(scores, ranks, groups)
    close(loss, (math.log(2) + math.log(4)) / 2)
    close(stats["num_pairs"], 7.0)
    close(stats["num_groups"], 2.0)
    close(stats["accuracy"], 6 * 0.5 / 7)


def test_a_margin_is_subtracted_from_the_lead_at_better_worse():
    scores, ranks, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.tensor([0, 0])
    margin = torch.tensor([[NAN, 3.0], [INF, NAN]])
    for kind in ("pairwise", "plackett_luce"):
        loss, stats = F.ranking_loss(scores, ranks, groups, margin, kind)
        close(loss, math.log(1 + math.exp(2)))
        close(stats["margin"], 1.0)  # of the scores, without the demanded margin


def test_plackett_luce_is_the_likelihood_of_choosing_best_first():
    scores = draw(0, 5).double()
    order = [3, 0, 4, 1, 2]
    ranks = torch.empty(5, dtype=torch.long)
    ranks[order] = torch.arange(5)
    loss, _ = F.ranking_loss(scores, ranks, torch.zeros(5), kind="plackett_luce")
    stages = [log_softmax(scores[order[i:]], 0)[0] for i in range(4)]
    close(loss, -sum(stages) / 4)


def test_tied_responses_do_not_compete_in_plackett_luce():
    scores, groups = torch.zeros(3), torch.zeros(3)
    for ranks, expected in (([0, 0, 1], math.log(2)), ([0, 1, 1], math.log(3))):
        loss, _ = F.ranking_loss(scores, torch.tensor(ranks), groups, kind="plackett_luce")
        close(loss, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_a_tied_prompt_gets_no_gradient_even_from_infinite_scores(kind):
    scores = leaf(torch.tensor([1.0, 0.0, INF, INF]))
    loss, _ = F.ranking_loss(
        scores, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]), kind=kind
    )
    with torch.autograd.detect_anomaly(check_nan=True):  # nor a nan on the way there
        loss.backward()
    close(loss.detach(), math.log(1 + math.exp(-1)))
    exact(scores.grad[2:], torch.zeros(2))
    assert scores.grad[:2].isfinite().all()


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_ranking_loss_stays_finite_for_hopeless_scores(kind):
    scores = leaf(torch.tensor([-1e4, 1e4]))
    loss, _ = F.ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 0]), kind=kind)
    loss.backward()
    close(loss.detach(), 2e4)
    close(scores.grad, [-1.0, 1.0])


def test_ranking_loss_upcasts_and_returns_detached_float32():
    scores = leaf(torch.tensor([1.0, 0.5, 0.25]).bfloat16())
    loss, stats = F.ranking_loss(scores, torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3))
    terms = [math.log(1 + math.exp(-lead)) for lead in (0.5, 0.75, 0.25)]
    close(loss.detach(), sum(terms) / 3)
    assert set(stats) == {"accuracy", "margin", "num_pairs", "num_groups"}
    for value in stats.values():
        assert not value.requires_grad and value.shape == () and value.dtype == torch.float32


@pytest.mark.parametrize("ranks, groups", [([0, 0], [0, 0]), ([0, 1], [0, 1]), ([], [])])
def test_ranked_data_without_a_single_pair_is_refused(ranks, groups):
    with pytest.raises(ValueError, match="no two responses of one prompt differ in rank"):
        F.ranking_loss(torch.zeros(len(ranks)), torch.tensor(ranks), torch.tensor(groups))


def test_an_unknown_ranking_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="pairwise or plackett_luce, got 'hinge'"):
        F.ranking_loss(torch.zeros(2), torch.tensor([0, 1]), torch.zeros(2), kind="hinge")


# Soft labels, smoothing, centring


def one_pair(lead, **options):
    """Loss and gradient of a pair whose better response leads by `lead`."""
    scores = leaf(torch.tensor([0.0, lead]))
    loss, _ = F.ranking_loss(scores, torch.tensor([1, 0]), torch.zeros(2), **options)
    loss.backward()
    return loss.detach(), scores.grad


def test_a_soft_label_is_a_mixture_of_both_orders():
    targets = torch.tensor([[0.25], [0.75]])  # of each response, that it is preferred
    loss, _ = one_pair(1.0, targets=targets)
    close(loss, 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1)))


@pytest.mark.parametrize(
    "options, probability",
    [
        ({"targets": torch.tensor(0.8)}, 0.8),
        ({"label_smoothing": 0.1}, 0.9),
        ({"targets": torch.tensor(0.8), "label_smoothing": 0.1}, 0.8 * 0.9 + 0.2 * 0.1),
        ({"targets": torch.tensor(0.3)}, 0.3),
    ],
)
def test_the_loss_of_a_pair_is_least_where_the_model_says_the_labels_probability(
    options, probability
):
    best = math.log(probability / (1 - probability))
    least, gradient = one_pair(best, **options)
    close(gradient, [0.0, 0.0])
    entropy = -probability * math.log(probability) - (1 - probability) * math.log(1 - probability)
    close(least, entropy)
    assert one_pair(best + 0.5, **options)[0] > least < one_pair(best - 0.5, **options)[0]


def test_sure_labels_without_smoothing_are_the_plain_loss():
    scores, ranks, groups = draw_ranked(3, 9)
    plain, _ = F.ranking_loss(scores, ranks, groups)
    sure, _ = F.ranking_loss(scores, ranks, groups, targets=torch.ones(9, 9), label_smoothing=0.0)
    exact(sure, plain)


def test_a_smoothed_loss_bounds_the_gradient_of_a_lead():
    _, gradient = one_pair(1e4, label_smoothing=0.1)
    close(gradient, [-0.1, 0.1])  # back towards the worse one
    _, gradient = one_pair(-1e4, label_smoothing=0.1)
    close(gradient, [0.9, -0.9])


def test_the_centring_term_is_the_squared_sum_of_a_pair():
    scores, ranks = leaf(torch.tensor([2.0, 1.0])), torch.tensor([0, 1])
    loss, stats = F.ranking_loss(scores, ranks, torch.zeros(2), center_coef=0.1)
    loss.backward()
    close(loss.detach(), math.log(1 + math.exp(-1)) + 0.1 * 9)
    pull, push = 0.1 * 2 * 3, 1 / (1 + math.exp(1))
    close(scores.grad, [pull - push, pull + push])
    close(stats["margin"], 1.0)


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_only_centring_sees_a_shift_of_all_scores(kind):
    scores, ranks, groups = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0, 1, 2]), torch.zeros(3)
    plain = [F.ranking_loss(scores + shift, ranks, groups, kind=kind)[0] for shift in (0, 5)]
    close(plain[0], plain[1])
    centred = [
        F.ranking_loss(scores + shift, ranks, groups, kind=kind, center_coef=0.5)[0]
        for shift in (0, 5)
    ]
    # Sums of the three pairs: 1, 0, -1; shifted by 5: 11, 10, 9.
    close(centred[0] - plain[0], 0.5 * 2 / 3)
    close(centred[1] - plain[1], 0.5 * (121 + 100 + 81) / 3, atol=1e-4)


def test_centring_weighs_every_prompt_the_same_and_leaves_ties_out():
    # Prompt 0: three pairs of sum 2. Prompt 1: two pairs of sum 6 and a tie, of sum -90.
    scores = torch.tensor([1.0, 1, 1, 51, -45, -45])
    ranks, groups = torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    plain, _ = F.ranking_loss(scores, ranks, groups)
    loss, _ = F.ranking_loss(scores, ranks, groups, center_coef=1.0)
    close(loss - plain, (4 + 36) / 2, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_outside_the_pairs_changes_nothing(garbage):
    scores, ranks = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([0, 1, 3, 3])
    groups = torch.tensor([0, 0, 1, 1])  # the second prompt is tied
    clean = leaf(scores)
    targets, margin = torch.full((4, 4), 0.7), torch.full((4, 4), 0.2)
    options = {"label_smoothing": 0.05, "center_coef": 0.3}
    expected, _ = F.ranking_loss(clean, ranks, groups, margin, targets=targets, **options)
    expected.backward()
    dirty = leaf(scores.clone())
    with torch.no_grad():
        dirty[2:] = garbage
    outside = torch.ones(4, 4, dtype=torch.bool)
    outside[0, 1] = False
    loss, _ = F.ranking_loss(
        dirty,
        ranks,
        groups,
        margin.masked_fill(outside, garbage),
        targets=targets.masked_fill(outside, garbage),
        **options,
    )
    with torch.autograd.detect_anomaly(check_nan=True):
        loss.backward()
    exact(loss.detach(), expected.detach())
    exact(dirty.grad[:2], clean.grad[:2])
    exact(dirty.grad[2:], torch.zeros(2))


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_a_target_that_is_no_probability_is_refused(value):
    with pytest.raises(ValueError, match=r"targets must be probabilities in \[0, 1\]"):
        one_pair(1.0, targets=torch.tensor(value))


@pytest.mark.parametrize("value", [-0.1, 0.5, NAN])
def test_label_smoothing_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\), got"):
        one_pair(1.0, label_smoothing=value)


@pytest.mark.parametrize("options", [{"targets": torch.ones(2, 2)}, {"label_smoothing": 0.1}])
def test_plackett_luce_refuses_labels_of_single_pairs(options):
    with pytest.raises(ValueError, match="plackett_luce is the likelihood of a whole ranking"):
        one_pair(1.0, kind="plackett_luce", **options)
