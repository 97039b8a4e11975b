"""What SFT and the reward model share around the Trainer of transformers."""
