"""Scorers: (prompts, responses) -> one score per response, or one reward per token.

A scorer is any callable `(prompts, responses) -> (B,) numbers`. Prompts are text or messages, as in
the data; responses are text. The same objects serve PPO, evaluation and library users:

    scorer = load_scorer(ScorerConfig(path="runs/mine/reward/final"))
    scorer(["Name a fruit."], ["An apple."])       # tensor([0.31])

- A trained reward model, normalised as `scorer.normalize` says.
- A Python function, asynchronous or not, or a class with `__call__`. A parameter that has the name
  of a column of the rows gets its B values; `**kwargs` gets all columns. One with a parameter
  `response_ids` is given the B lists of token ids (stop token included) and may return a list of
  rewards for each, one per token; their sum is the score.
- The URL of a server that scores (`remote`); `scoring_server` serves any scorer.
- A language model that judges by a rubric (`judge`).
- Several of these (`scorer.components`): a weighted sum, or an ensemble's mean, min, or mean minus
  its standard deviation. A component with a `gate` counts alone where its score is bad enough
  (Llama 2's safety model).

A scorer that fails, or returns anything but finite numbers, stops the run with the cause. Left out:
components that are combined themselves.
"""

from rlhf.scorers.call import Scorer, Scores, Tokens, counts_of, score_responses, uncut_scores
from rlhf.scorers.combined import (
    CombinedScorer,
    component_names,
    instance,
    judges,
    load_scorer,
    python_scorers,
    reward_models,
)
from rlhf.scorers.functions import require_columns
from rlhf.scorers.judge import Judge
from rlhf.scorers.remote import RemoteScorer
from rlhf.scorers.reward_model import RewardModelScorer, score_sequences, score_statistics
from rlhf.scorers.scoring_server import ScoreServer
from rlhf.scorers.while_sampling import ScoresInTheBackground
