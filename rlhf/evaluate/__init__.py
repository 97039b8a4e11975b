"""`python -m rlhf.evaluate`: is one model better than another, and how good is a reward model?

`pairwise` compares the answers of two models, `rewardbench` measures a reward model on pairs. Each
mode is a function of the options that `options` declares.
"""
