"""What swapping a stage would gain, and where best-of-n turns down, on numbers made by hand.

Run: python -m pytest tests/functional/test_stage_gains.py
"""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.functional import (
    best_of_n_at_kl,
    best_of_n_kl,
    estimate,
    score_levels,
    swap_gains,
    turning_point,
    weakest_link,
)
from rlhf.functional.stage_gains import Levels, at, doublings, resampled_means

P, N = 64, 16


def world(seed=0):
    """Gold scores of N samples to each of P prompts, normal around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.15 * torch.randn(P, N, generator=generator)


def noise(seed):
    return torch.randn(P, N, generator=torch.Generator().manual_seed(seed))


def best(proxy, gold):
    """Proxy and gold score of the sample that the proxy likes best."""
    chosen = proxy.argmax(dim=1, keepdim=True)
    return proxy.gather(1, chosen)[:, 0], gold.gather(1, chosen)[:, 0]


def verdict(proxy, gold, ppo_proxy, ppo_gold, good):
    levels = score_levels(proxy, gold, ppo_proxy, ppo_gold, torch.full((P,), good))
    return weakest_link(swap_gains(levels), 0.2 * float(gold.std()))


def test_a_healthy_run_has_no_weakest_link():
    gold = world()
    proxy = 2 * gold - 1
    found = verdict(proxy, gold, *best(proxy, gold), 0.7)
    assert found.stage is None and found.reason == "small"
    assert abs(found.gains["ppo"].mean) < 1e-6 and abs(found.gains["reward"].mean) < 1e-6


def test_an_sft_policy_that_never_says_the_right_thing_is_named():
    gold = world() - 0.4
    proxy = 2 * gold + 0.1 * noise(1)
    assert verdict(proxy, gold, *best(proxy, gold), 0.9).stage == "sft"


def test_a_reward_model_of_noise_is_named_also_where_ppo_followed_it_far():
    gold, proxy = world(), noise(1)
    assert verdict(proxy, gold, *best(proxy, gold), 0.75).stage == "reward"
    over_optimised = torch.full((P,), 9.0), torch.full((P,), 0.05)
    assert verdict(proxy, gold, *over_optimised, 0.75).stage == "reward"


def test_ppo_that_did_not_move_or_fell_below_its_start_is_named():
    gold = world()
    proxy = 2 * gold - 1 + 0.05 * noise(1)
    unmoved = proxy.mean(dim=1), gold.mean(dim=1)
    assert verdict(proxy, gold, *unmoved, 0.75).stage == "ppo"
    broken = proxy.mean(dim=1) - 1, gold.mean(dim=1) - 0.4
    assert verdict(proxy, gold, *broken, 0.75).stage == "ppo"


def test_the_gains_add_up_to_what_ppo_lacks():
    gold = world()
    proxy = gold + 0.1 * noise(1)
    ppo = proxy.mean(dim=1) + 0.1, gold.mean(dim=1) + 0.02
    levels = score_levels(proxy, gold, *ppo, torch.full((P,), 0.9))
    total = sum(swap_gains(levels).values())
    assert_close(total, levels.good - levels.ppo_gold)


def test_gains_of_the_worked_example():
    one = torch.ones(2).double()
    proxy, gold = torch.tensor([[0.0, 2.0]] * 2), torch.tensor([[0.5, 0.8]] * 2)
    levels = Levels([1, 16], proxy.double(), gold.double(), 0.9 * one, 0 * one, 0.5 * one, one)
    found = {name: float(draws[0]) for name, draws in swap_gains(levels).items()}
    assert found == pytest.approx({"sft": 0.1, "reward": 0.1, "ppo": 0.3}, abs=1e-6)


def test_without_ppo_and_known_good_answers_only_the_reward_model_is_measured():
    gold = world()
    gains = swap_gains(score_levels(noise(1), gold))
    assert gains["ppo"].isnan().all() and gains["sft"].isnan().all()
    found = weakest_link(gains, 0.01)
    assert found.stage == "reward" and list(found.gains) == ["reward"]


def test_equal_gains_are_close_and_nobody_is_named():
    draws = 0.3 + 0.05 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    draws[:, 0] = torch.tensor([0.3, 0.31])
    found = weakest_link({"sft": draws[0], "ppo": draws[1]}, 0.1)
    assert (found.stage, found.reason) == (None, "close")


def levels_of_curve(curve, num_samples=64, spread=0.0):
    """Levels whose gold scores over n are a function of the distance, with noise in resamples."""
    counts = doublings(num_samples)
    d = torch.tensor([best_of_n_kl(n) for n in counts]).double().sqrt()
    generator = torch.Generator().manual_seed(0)
    gold = curve(d) + spread * torch.randn(201, len(d), generator=generator).double()
    gold[0] = curve(d)
    rest = [torch.full((201,), torch.nan).double()] * 4
    return Levels(counts, d.expand(201, -1), gold, *rest)


def test_the_turning_point_of_a_known_curve_is_recovered_with_an_interval():
    turn = turning_point(levels_of_curve(lambda d: 0.5 + d * (0.4 - 0.2 * d), spread=0.003))
    found = estimate(turn.distance)
    assert found.mean == pytest.approx(1.0, abs=1e-6) and 0.9 < found.low < 1 < found.high < 1.1
    assert turn.most == pytest.approx(math.sqrt(math.log(64) - 63 / 64), abs=1e-6)


def test_a_curve_that_still_rises_turns_beyond_what_was_measured():
    rising = turning_point(levels_of_curve(lambda d: 0.3 * d))
    assert rising.distance[0] > rising.most
    bends_up = turning_point(levels_of_curve(lambda d: 0.1 * d + 0.1 * d * d))
    assert bends_up.distance[0] == math.inf
    falling = turning_point(levels_of_curve(lambda d: -0.1 * d))
    assert falling.distance[0] == 0


def test_best_of_n_at_equal_kl_is_not_extrapolated():
    levels = levels_of_curve(lambda d: 0.5 + 0.1 * d)
    kl = torch.full((201,), best_of_n_kl(8)).double()
    proxy, gold = best_of_n_at_kl(levels, kl)
    assert_close(proxy[0], kl[0].sqrt()) and assert_close(gold[0], 0.5 + 0.1 * kl[0].sqrt())
    assert best_of_n_at_kl(levels, kl + 9)[0].isnan().all()


def test_reading_between_points():
    x, y = torch.tensor([[0.0, 1.0, 3.0]] * 3), torch.tensor([[0.0, 10.0, 20.0]] * 3)
    assert at(x, y, torch.tensor([2.0, 9.0, -1.0])).tolist() == [15, 20, 0]
    assert doublings(16) == [1, 2, 4, 8, 16] and doublings(6) == [1, 2, 4, 6]


def test_resampled_means_draw_whole_prompts_and_leave_out_nan():
    columns = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0]])
    means = resampled_means(torch.cat([columns, columns[:, :1] + 1], dim=1), num_resamples=50)
    assert means[0].tolist() == [3, 4, 4] and len(means) == 51
    assert_close(means[:, 2], means[:, 0] + 1)
