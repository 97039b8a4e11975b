"""The reward model's report: how good are its scores on held-out rankings?

When training ends, the reward stage writes three files into `final/`: `report.json`, `report.md`
and, with matplotlib (`pip install 'rlhf[plot]'`), `report.png`. PPO reads `report.json` and prints
its summary and warnings before it trains. For a reward model without a report, for other held-out
rows, or to see how far two seeds agree:

    python -m rlhf.reward.report path=runs/mine/reward/final compare=[runs/two/reward/final]

`measures` has the numbers, `verdict` the rules of the warnings, `page` what people read. Left out:
bootstrap over training runs, human agreement.

`report.json`. Scores are raw, before any normalisation, and in logits: sigmoid(difference of two)
is a probability. Lengths are tokens of the response, EOS included. A pair is two responses to one
prompt whose ranks differ; an equal score counts as half right. `_low` and `_high` are the ends of a
95 % bootstrap interval that resamples prompts, as the pairs of a prompt depend on each other. A
number that cannot be computed is null; a slice without pairs is absent.

    data              source of the held-out rows
    num_prompts, num_responses, num_pairs
    summary           the main numbers in one line
    warnings          what is wrong, with the remedy, one text each; thresholds in `verdict`
    slices            {group: {name: slice}}; the groups are
      all             all: every pair
      length          similar (the shorter has at least 0.8 of the longer's tokens), else better
                      longer or better shorter: whether the better response is the longer one
      ranks apart     1, 2, 3+: difference of the two ranks
      score gap       quarter 1 to 4: by |difference of the scores|, smallest first
      subset          the rows' field `subset`, the ten with the most pairs
    a slice           accuracy: share of pairs whose better response scores higher; longer_wins: the
                      same of the rule "the longer response wins"; each with _low and _high;
                      score_gap: mean |difference of the scores|; num_pairs, num_prompts
    calibration       ece: mean |predicted - observed| over pairs; brier: mean squared error, 0.25
                      for a coin; bins: predicted (mean sigmoid(score gap)), observed (share ranked
                      right), num_pairs
    length            correlation of score and length: pearson, spearman, over all responses;
                      within_prompt_pearson, within_prompt_spearman: mean over num_prompts prompts
                      (those where both vary)
    order             top1: share of prompts whose best response scores highest; top1_chance: of a
                      random choice; kendall_tau: mean over prompts, tau-b
    scores            of all, best and worst (ranked) responses: mean, std, q05, q25, q50, q75, q95
    mistakes          the largest wrong score gaps, at most one per prompt: prompt, and of better
                      and worse response, score, rank, length (texts shortened)
    agreement         with each model of compare=, if given: model; accuracy: its own; pearson: of
                      the scores around their prompt's mean; ordered_alike: share of num_pairs pairs
                      of responses, also of equal rank
"""
