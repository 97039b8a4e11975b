"""Tests of rlhf.functional.ranking against explicit loops and closed forms.

Run: pytest tests/test_functional_ranking.py
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import INF, NAN, close, draw, exact, few, leaf, seeds
from torch.nn.functional import log_softmax

from rlhf import functional as F

# ranking_loss


def ranking_loss_by_loops(scores, ranks, groups, margin, kind):
    """Return loss, number of pairs, pairs ordered right, sum of leads; scores in float64."""
    group_losses, pairs, right, leads = [], 0, 0.0, 0.0
    for group in sorted(set(groups.tolist())):
        members = [i for i in range(len(scores)) if groups[i] == group]
        terms = []
        for i in members:
            worse = [j for j in members if ranks[i] < ranks[j]]
            rivals = []
            for j in worse:
                lead = scores[i] - scores[j]
                rivals.append(torch.exp(scores[j] + margin[i, j] - scores[i]))
                pairs, leads = pairs + 1, leads + lead.item()
                right += 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
            if kind == "pairwise":
                terms += [torch.log(1 + rival) for rival in rivals]
            elif worse:
                terms.append(torch.log(1 + sum(rivals)))
        if terms:
            group_losses.append(sum(terms) / len(terms))
    return sum(group_losses) / len(group_losses), pairs, right / pairs, leads / pairs


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
@few
@given(
    seed=seeds, num_items=st.integers(2, 12), margin=st.sampled_from(["none", "float", "matrix"])
)
def test_ranking_loss_equals_explicit_loops(kind, seed, num_items, margin):
    generator = torch.Generator().manual_seed(seed)
    scores = (4 * draw(seed, num_items)).round() / 2  # some scores are equal
    ranks = torch.randint(4, (num_items,), generator=generator)
    groups = torch.randint(-1, 3, (num_items,), generator=generator) * 10
    ranks[:2], groups[:2] = torch.tensor([0, 1]), groups[0]  # at least one pair
    given_margin, matrix = None, torch.zeros(num_items, num_items)
    if margin == "float":
        given_margin, matrix = 0.3, torch.full_like(matrix, 0.3)
    elif margin == "matrix":
        given_margin = matrix = draw(seed + 1, num_items, num_items).double()
    ours, theirs = leaf(scores), leaf(scores.double())
    loss, stats = F.ranking_loss(ours, ranks, groups, given_margin, kind)
    reference, pairs, right, lead = ranking_loss_by_loops(theirs, ranks, groups, matrix, kind)
    loss.backward()
    reference.backward()
    close(loss.detach(), reference.detach())
    close(ours.grad, theirs.grad)
    close(stats["num_pairs"], pairs)
    close(stats["accuracy"], right)
    close(stats["margin"], lead)


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
