"""Everything that a stage writes to the disk: its result, its checkpoints, and where it may write.

- The hand-off: `stage_directory` writes, reads and compares `final/`; `record` is its `rlhf.json`.
- The run directory: `run_directory` begins, resumes and ends a run, `config_changes` says which
  settings may change then, `ownership` tells and deletes what the run wrote, `lock` keeps others
  out.
- `hosts` copies between hosts that share no file system.
- Checkpoints: `disk` writes whole directories, `state` is the content of a PPO checkpoint,
  `tensor_files` its tensors, whole or in slices. The last two, which are not imported here, need
  torch.
- What can stop a run: `interruption` (signals), `finite` (nan), `disk` (no space).
"""

from rlhf.checkpoint.config_changes import explain_stop, read_settings
from rlhf.checkpoint.disk import (
    UNSEALED,
    complete_or_nothing,
    disk_errors,
    find_damage,
    holds_tensors,
    read_manifest,
)
from rlhf.checkpoint.finite import (
    NonFiniteError,
    find_non_finite,
    find_non_finite_in,
    find_non_finite_on_any,
    optimizer_tensors,
)
from rlhf.checkpoint.hosts import collect_from_hosts, copy_to_all_hosts
from rlhf.checkpoint.interruption import GracefulStop
from rlhf.checkpoint.lock import locked
from rlhf.checkpoint.ownership import (
    prune_checkpoints,
    publish,
    refuse_taken_steps,
    run_id,
    step_of,
)
from rlhf.checkpoint.record import (
    RECORD,
    StageRecord,
    hash_weights,
    make_record,
    parent_weights,
    read_record,
    write_record,
)
from rlhf.checkpoint.run_directory import StageRun, checkpoint_to_resume, finished_run, open_run
from rlhf.checkpoint.stage_directory import (
    adapter_and_base,
    adapter_on_base,
    adapters_in,
    describe_saved,
    require_same_tokenizer,
    require_same_weights,
    require_stage,
    require_writable,
    warn_about_prompts,
    warn_about_sft_model,
    warn_about_template,
    write_stage,
)
