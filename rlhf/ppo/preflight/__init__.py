"""What PPO examines before it trains: memory, the policy's first responses, the scorer.

    python -m rlhf.ppo recipe=demo preflight=only     examine, and train nothing

Reading order: `examine` (everything in order), `memory` and `longest_step` (does the run fit?),
`samples` (policy, tokenizer and scorer), `findings` (what is printed).
"""

from rlhf.ppo.preflight.examine import PreflightFailed, run_preflight
