"""What the SFT and reward stages share around the transformers Trainer.

`arguments` builds its arguments, and `settings` tries them before anything loads. `training` starts
or resumes it, and adds metrics, checkpoints and clean stops to its loop. `finite_trainer` keeps
numbers that are not finite away from the weights.
"""

from rlhf.hf_trainer.arguments import (
    as_in_training,
    describe_batches,
    row_length,
    trainer_arguments,
)
from rlhf.hf_trainer.finite_trainer import FiniteTrainer
from rlhf.hf_trainer.training import best_step, run_trainer
