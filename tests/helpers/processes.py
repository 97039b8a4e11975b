"""Processes that are forks of one which has imported torch and the libraries.

A fork server imports what the first user of it asks for, so all users ask here.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("rlhf.sft.stage", "rlhf.reward.stage", "rlhf.ppo.stage"),
        # for test_mutants.py; torch needs two of them at its first comparison and dispatch mode
        *("torch._dynamo", "torch.distributions", "sympy", "hypothesis", "pytest"),
    ]
)
