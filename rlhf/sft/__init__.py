"""Supervised fine-tuning: `python -m rlhf.sft`, or `rlhf.train_sft(SFTStageConfig(...))`."""
