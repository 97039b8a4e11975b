"""Processes that are forks of one which has imported torch and the libraries.

A fork server imports what the first user of it asks for, so all users ask here.
"""

import gc
import multiprocessing

PRELOADED = [
    *("rlhf.sft.stage", "rlhf.reward.stage", "rlhf.ppo.stage"),
    # torch needs these at its first optimiser step, comparison and dispatch mode
    *("torch._dynamo", "torch.distributions", "sympy"),
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*PRELOADED, "hypothesis", "pytest"])  # two for test_mutants.py


class Fork(FORKS.Process):
    """A fork that draws no pictures, and whose Trainer, which collects garbage several times, does
    not search all that it inherited: half a second each time."""

    def run(self) -> None:
        from helpers.commands import draw_no_pictures

        draw_no_pictures()
        gc.freeze()
        super().run()
