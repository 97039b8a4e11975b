"""Scorers: (prompts, responses) -> one score per response, or one reward per token.

A scorer is any callable `(prompts, responses) -> (B,) numbers`, with `prompts` as they stand in the
data (text or messages) and `responses` as text. The same objects serve PPO, evaluation and library
users:

    scorer = load_scorer(ScorerConfig(path="runs/mine/reward/final"))
    scorer(["Name a fruit."], ["An apple."])       # tensor([0.31])

- A trained reward model, normalised as `scorer.normalize` says.
- A Python function. One with a parameter `response_ids` is given the B lists of token ids (stop
  token included) and may return a list of rewards for each, one per token: PPO gives them at their
  tokens, and their sum is the score.
- Several of these (`scorer.components`): a weighted sum, or an ensemble's mean, min, or mean minus
  its standard deviation. One with a `gate` counts alone where its score is bad enough (Llama 2's
  safety model). Each component's mean score is a metric of its own.

A scorer that fails, or returns anything but finite numbers, stops the run with the cause. Left out:
remote scorers, and components that are combined themselves.
"""

from rlhf.scorers.call import (
    CombinedScorer,
    Scorer,
    Scores,
    Tokens,
    check_scores,
    checked_scores,
    combine_scores,
    component_names,
    load_scorer,
    reward_models,
    score_responses,
)
from rlhf.scorers.reward_model import RewardModelScorer, score_sequences, score_statistics
from rlhf.tokenizer import hash_rendering
