"""Write a plain model directory: python -m rlhf.export path=runs/demo/ppo/checkpoint-40 out=policy

What `from_pretrained`, `transformers serve` and every other reader of Hugging Face directories
load is made of a directory that holds adapters or the state of a run. Options, each as key=value:

    path    checkpoint-N of an SFT or PPO run, or a model: whole, or a PEFT adapter; directory or
            Hub id
    out     directory to write; must be new or empty
    dtype   float32, bfloat16, float16, or auto, as it is stored (the default); the head of a reward
            model stays in float32
    trust_remote_code  true: Python files of the model, and functions that config.yaml of a
            checkpoint names, may run (false)

Tokenizer, chat template, rlhf.json and config.yaml go along. A checkpoint is built as its run built
the model, from the paths in its config.yaml; where the run averages its weights (ppo.ema_decay),
the averages are written, as into final/. Left out: checkpoints of the reward stage, which lack the
scale of the scores.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf.cli import run_command
from rlhf.config import (
    STAGES,
    InputError,
    ModelConfig,
    PPOStageConfig,
    StageConfig,
    load_config,
    nearest,
    refuse_named_code,
)
from rlhf.config.knobs import DTYPES

CONFIG = "config.yaml"
ITS_MODEL = "its model.path"  # that of a checkpoint's run, in messages


@dataclass
class ExportOptions:
    """The command line; see the module's docstring."""

    path: str | None = None
    out: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False


def export(options: ExportOptions) -> None:
    """Write the directory and say how to use it.

    Raises:
        InputError: bad options, nothing that can be exported, or something would be overwritten.
    """
    _check(options)
    import transformers

    from rlhf.checkpoint import complete_or_nothing, find_non_finite, require_stage
    from rlhf.checkpoint.stage_directory import RECORD, write_record
    from rlhf.console import say
    from rlhf.hub import local_directory
    from rlhf.models import mend_sampling_settings

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, out = local_directory(options.path, "path", weights=False), Path(str(options.out))
    code = options.trust_remote_code
    if (path / CONFIG).is_file() and not (path / RECORD).is_file():
        model, tokenizer, record = load_checkpoint(path, code)
    else:
        record = require_stage(path, tuple(STAGES), "path")
        model, tokenizer = load_directory(str(options.path), code)
    for line in mend_sampling_settings(model):
        say(line)
    if options.dtype != "auto":
        _cast(model, options.dtype)
    problem = find_non_finite(model.state_dict().items())
    if problem is not None:
        raise InputError(
            f"path={path} cannot be exported with dtype={options.dtype}: {problem}; take another "
            "checkpoint, or dtype=bfloat16 or float32 if dtype=float16 cannot hold its weights"
        )
    with complete_or_nothing(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if (path / CONFIG).is_file():
            shutil.copyfile(path / CONFIG, temporary / CONFIG)
        if record is not None:
            write_record(temporary, record, model)
    _report(model, out)


def _check(options: ExportOptions) -> None:
    for name in ("path", "out"):
        if not getattr(options, name):
            raise InputError(f"{name} is missing; write path=<directory> out=<new directory>")
    if not Path(str(options.path)).is_dir() and "/" not in str(options.path):
        raise InputError(f"path={options.path}: no such directory")
    if options.dtype not in DTYPES:
        hint = nearest(options.dtype, DTYPES)
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype}.{hint}")
    out = Path(str(options.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out} exists and is not empty; choose another")


# --- What is exported ---------------------------------------------------------------------------


def load_checkpoint(path: Path, trust_remote_code: bool = False) -> tuple[Any, Any, Any]:
    """Build the policy that a checkpoint of an SFT or PPO run holds.

    Args:
        trust_remote_code: whether Python files of the model, and a function that makes the
            tokenizer, may run; what config.yaml says of it does not count.

    Returns:
        Plain model, tokenizer, and a `StageRecord` for it.

    Raises:
        InputError: the checkpoint is damaged or of the reward stage, what its run started from is
            gone, or code would run.
    """
    from rlhf.checkpoint import (
        find_damage,
        make_record,
        read_manifest,
        read_record,
        step_of,
    )
    from rlhf.tokenizer import load_tokenizer

    damage = find_damage(path)
    if damage is not None:
        raise InputError(f"path={path} is damaged or incomplete: {damage}; take another checkpoint")
    stage = ((read_manifest(path) or {}).get("run") or {}).get("stage")
    if stage not in ("sft", "ppo"):
        raise InputError(
            f"path={path} is a checkpoint of the {stage} stage; only those of sft and ppo can be "
            "exported. Finish the run with resume=true and use its final/"
        )
    config = load_config(STAGES[stage], path / CONFIG)
    config.model.trust_remote_code = trust_remote_code
    if not trust_remote_code:
        refuse_named_code({"model.tokenizer": config.model.tokenizer}, path / CONFIG)
    try:
        tokenizer = load_tokenizer(config.model, ITS_MODEL)
        model = _policy_of(path, stage, config, tokenizer)
    except InputError as error:
        raise InputError(
            f"{path}: {error}. The paths in its {CONFIG} are those of the run: export from the "
            "folder where the run was started"
        ) from error
    sources = (path.parent / "final", Path(str(config.model.path)))
    known = [r.prompts for r in map(read_record, sources) if r is not None]
    prompts = known[0] if known else None
    record = make_record(stage, config, config.model.path, tokenizer, prompts)
    record.metrics = {"update" if stage == "ppo" else "step": step_of(path)}
    return model, tokenizer, record


def _policy_of(path: Path, stage: str, config: StageConfig, tokenizer: Any) -> Any:
    """Build the model as the stage does, and give it the weights of the checkpoint."""
    import torch
    from safetensors.torch import load_file

    from rlhf.checkpoint import load_modules
    from rlhf.models import (
        add_lora,
        load_adapter,
        load_policy,
        merged,
        new_token_rows,
        sample_as_trained,
        unwrap_peft,
    )

    if stage == "sft" and not config.peft.enabled:  # the transformers Trainer writes all of it
        own = dataclasses.replace(config.model, path=str(path), revision=None)
        return load_policy(own, tokenizer, "path")
    torch.manual_seed(config.seed)  # a model from model.config has random weights
    model: Any = load_policy(config.model, tokenizer, ITS_MODEL)
    if config.peft.enabled:
        rows = new_token_rows(tokenizer, config.model, config.peft)
        model = add_lora(model, config.peft, "CAUSAL_LM", config.seed, rows)
    if stage == "sft":
        load_adapter(model, load_file(path / "adapter_model.safetensors"), f"path={path}")
    else:
        averaged = (path / "averages.safetensors").is_file()
        load_modules(path, {"averages" if averaged else "policy": model})
        ppo = cast(PPOStageConfig, config).ppo
        sample_as_trained(unwrap_peft(model), ppo.temperature, ppo.top_p, ppo.top_k)
    return merged(model)


def load_directory(path: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a policy or reward model, its adapters merged, and its tokenizer as it is.

    Args:
        trust_remote_code: whether Python files of the model may run.

    Raises:
        InputError: it cannot be loaded.
    """
    from rlhf.hub import find_source
    from rlhf.models import load_policy, load_reward_model
    from rlhf.tokenizer import read_tokenizer

    is_classifier = find_source(path, "path", code=trust_remote_code).is_classifier
    config = ModelConfig(path=path, dtype="auto", trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(config, "path")
    if is_classifier:
        return load_reward_model(config, "path", encoders=True), tokenizer
    return load_policy(config, tokenizer, "path"), tokenizer


def _cast(model: Any, dtype: str) -> None:
    """Round every weight but the head of a reward model, in place."""
    import torch

    from rlhf.models import HEAD

    for name, parameter in model.named_parameters():
        if not name.startswith(f"{HEAD}."):
            parameter.data = parameter.data.to(getattr(torch, dtype))


def _report(model: Any, out: Path) -> None:
    from rlhf.console import say
    from rlhf.models import parameter_count

    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    say(f"saved {out}: {name}, {parameter_count(model)[0]:,} parameters, {dtype}, {size:,.1f} MB")
    if name.endswith("ForSequenceClassification"):
        say(f'  AutoModelForSequenceClassification.from_pretrained("{out}")')
        say(f"  python -m rlhf.ppo scorer.path={out} ...")
    else:
        say(f'  AutoModelForCausalLM.from_pretrained("{out}")')
        say(f"  python -m rlhf.chat path={out}")
        say(f"  transformers serve {out}")


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ExportOptions, export, sys.argv[1:]))
