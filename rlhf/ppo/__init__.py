"""PPO against a scorer: `python -m rlhf.ppo`, or `rlhf.train_ppo(PPOStageConfig(...))`."""
