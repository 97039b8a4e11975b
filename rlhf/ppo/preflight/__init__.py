"""What PPO examines before it trains: memory, batch, texts, scorer."""
