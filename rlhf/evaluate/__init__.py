"""`python -m rlhf.evaluate`: is one model better than another, and how good is a reward model?

`pairwise` compares the answers of two models, `rewardbench` measures a reward model on pairs,
`lm_eval` runs the tasks of lm-evaluation-harness. Each mode is a function of the options that
`options` declares.
"""
