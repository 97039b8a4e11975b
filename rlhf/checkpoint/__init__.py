"""What a stage hands to the next one, and what a stopped run resumes from.

`stage_directory` is the hand-off. `run_directory` decides where a stopped run continues,
`ownership` says what a run made in its directory, `lock` keeps a second run out of it. `state` is
what a PPO checkpoint holds. `atomic` writes whole directories and finds damage, `finite` finds
numbers that are not finite, `disk` explains a disk that takes no more, `interruption` stops a run.
"""

from rlhf.checkpoint.atomic import (
    UNSEALED,
    complete_or_nothing,
    find_damage,
    read_manifest,
    write_manifest,
)
from rlhf.checkpoint.disk import disk_errors
from rlhf.checkpoint.finite import (
    NonFiniteError,
    find_non_finite,
    find_non_finite_in,
    optimizer_tensors,
)
from rlhf.checkpoint.interruption import GracefulStop, explain_stop
from rlhf.checkpoint.lock import locked, one_writer
from rlhf.checkpoint.open_run import StageRun, open_run
from rlhf.checkpoint.ownership import (
    complete_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    publish,
    refuse_taken_steps,
    seal,
    step_of,
)
from rlhf.checkpoint.run_directory import (
    check_run_directory,
    checkpoint_to_resume,
    finished_run,
    prepare_run_directory,
)
from rlhf.checkpoint.stage_directory import (
    RECORD,
    StageRecord,
    check_same_tokenizer,
    check_weights,
    check_writable,
    hash_weights,
    make_record,
    read_record,
    require_stage,
    warn_about_prompts,
    warn_about_sft_model,
    warn_about_template,
    write_record,
    write_stage,
)
from rlhf.checkpoint.state import (
    load_modules,
    load_training_state,
    random_state,
    save_training_state,
)
from rlhf.hub import is_hub_id
from rlhf.tokenizer import hash_tokenizer
