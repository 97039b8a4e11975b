"""What the SFT and reward stages share around the transformers Trainer.

`arguments` builds its arguments, and `settings` tries them before anything loads. `training` starts
or resumes it, `callbacks` adds metrics, checkpoints and clean stops to its loop, and
`finite_trainer` keeps numbers that are not finite away from the weights.
"""

from rlhf.hf_trainer.arguments import (
    as_in_training,
    check_max_length,
    describe_batches,
    is_sharded,
    trainer_arguments,
)
from rlhf.hf_trainer.callbacks import best_step
from rlhf.hf_trainer.finite_trainer import FiniteTrainer
from rlhf.hf_trainer.training import run_trainer
