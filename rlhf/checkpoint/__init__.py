"""Everything that a stage writes to the disk: its result, its checkpoints, and where it may write.

- The hand-off: `stage_directory` writes and reads `final/`, `record` describes it (`rlhf.json`),
  `weight_hashes` recognises its weights, `earlier_stages` compares two stages.
- The run directory: `run_directory` begins and ends a run, `resume` finds the checkpoint where a
  stopped run continues, `config_changes` says which settings may change then, `ownership` tells
  what the run wrote, `cleanup` deletes it, `lock` keeps other runs out.
- Checkpoints: `state` is the content of a PPO checkpoint, `atomic` writes whole directories and
  finds damage.
- What can stop a run: `interruption` (signals), `finite` and `nonfinite_stop` (nan), `disk`.
"""

from rlhf.checkpoint.atomic import UNSEALED, complete_or_nothing, find_damage, read_manifest
from rlhf.checkpoint.cleanup import prune_checkpoints
from rlhf.checkpoint.disk import disk_errors
from rlhf.checkpoint.earlier_stages import (
    require_same_tokenizer,
    warn_about_prompts,
    warn_about_sft_model,
    warn_about_template,
)
from rlhf.checkpoint.finite import (
    NonFiniteError,
    find_non_finite,
    find_non_finite_in,
    optimizer_tensors,
)
from rlhf.checkpoint.interruption import GracefulStop
from rlhf.checkpoint.lock import locked
from rlhf.checkpoint.ownership import publish, refuse_taken_steps, run_id, step_of
from rlhf.checkpoint.record import RECORD, StageRecord, make_record, read_record, write_record
from rlhf.checkpoint.resume import checkpoint_to_resume, explain_stop
from rlhf.checkpoint.run_directory import StageRun, finished_run, open_run
from rlhf.checkpoint.stage_directory import (
    require_same_weights,
    require_stage,
    require_writable,
    write_stage,
)
from rlhf.checkpoint.state import (
    load_modules,
    load_training_state,
    random_state,
    save_training_state,
)
from rlhf.checkpoint.weight_hashes import hash_weights
