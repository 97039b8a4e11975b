"""Processes that are forks of one which has imported torch and the libraries.

A fork server imports what the first user of it asks for, so all users ask here.
"""

import multiprocessing

PRELOADED = [
    *("rlhf.sft.stage", "rlhf.reward.stage", "rlhf.ppo.stage"),
    # torch needs these at its first optimiser step, comparison and dispatch mode
    *("torch._dynamo", "torch.distributions", "sympy"),
]
FORKS = multiprocessing.get_context("forkserver")
# two of them are for test_mutants.py
FORKS.set_forkserver_preload([*PRELOADED, "hypothesis", "pytest", "helpers.preloaded"])
