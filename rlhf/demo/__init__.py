"""The embedded demo: a small world whose true reward is known, and the three stages on it."""
