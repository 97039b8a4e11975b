"""Reward modelling on ranked responses: `python -m rlhf.reward`, or
`rlhf.train_reward(RewardStageConfig(...))`."""
