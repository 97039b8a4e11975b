"""The hand-off between stages, and the state that a stopped run resumes from.

`handoff` is what a stage leaves for the next one, `resume` decides where a stopped run continues,
`ownership` says what a run made in its directory, `lock` keeps a second run out of it, `state` is
what a PPO checkpoint holds, `interruption` how a run is stopped, `files` how directories are
written whole and damage is found, `finite` how numbers that are not finite are, `disk` what is said
where a disk takes no more.
"""

from rlhf.checkpoint.disk import disk_errors
from rlhf.checkpoint.files import (
    UNSEALED,
    complete_or_nothing,
    find_damage,
    read_manifest,
    write_manifest,
)
from rlhf.checkpoint.finite import (
    NonFiniteError,
    find_non_finite,
    find_non_finite_in,
    optimizer_tensors,
)
from rlhf.checkpoint.handoff import (
    StageRecord,
    check_same_tokenizer,
    check_weights,
    check_writable,
    hash_tokenizer,
    hash_weights,
    is_hub_id,
    make_record,
    read_record,
    require_stage,
    warn_about_prompts,
    warn_about_sft_model,
    warn_about_template,
    write_stage,
)
from rlhf.checkpoint.interruption import GracefulStop, explain_stop
from rlhf.checkpoint.lock import locked, one_writer
from rlhf.checkpoint.ownership import (
    complete_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    publish,
    refuse_taken_steps,
    seal,
    step_of,
)
from rlhf.checkpoint.resume import (
    check_run_directory,
    checkpoint_to_resume,
    finished_run,
    prepare_run_directory,
)
from rlhf.checkpoint.state import (
    load_modules,
    load_training_state,
    random_state,
    save_training_state,
)

__all__ = [
    "GracefulStop",
    "NonFiniteError",
    "UNSEALED",
    "StageRecord",
    "check_run_directory",
    "check_same_tokenizer",
    "check_weights",
    "check_writable",
    "checkpoint_to_resume",
    "complete_checkpoints",
    "complete_or_nothing",
    "disk_errors",
    "explain_stop",
    "find_damage",
    "find_non_finite",
    "find_non_finite_in",
    "finished_run",
    "hash_tokenizer",
    "hash_weights",
    "is_hub_id",
    "latest_checkpoint",
    "load_modules",
    "load_training_state",
    "locked",
    "make_record",
    "one_writer",
    "optimizer_tensors",
    "prepare_run_directory",
    "prune_checkpoints",
    "publish",
    "random_state",
    "read_manifest",
    "read_record",
    "refuse_taken_steps",
    "require_stage",
    "save_training_state",
    "seal",
    "step_of",
    "warn_about_prompts",
    "warn_about_sft_model",
    "warn_about_template",
    "write_manifest",
    "write_stage",
]
