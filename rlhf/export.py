"""Write a plain model directory, its LoRA adapter alone, or one GGUF file for llama.cpp.

    python -m rlhf.export path=runs/demo/ppo/checkpoint-40 out=policy
    python -m rlhf.export path=runs/demo/ppo/checkpoint-40 out=adapter format=adapter
    python -m rlhf.export path=runs/demo/ppo/final out=policy.gguf format=gguf llama_cpp=llama.cpp

`from_pretrained`, `transformers serve` and other readers of Hugging Face directories cannot load
adapters of ours or the checkpoints of a run; they load what this command writes. Tokenizer, chat
template, rlhf.json and config.yaml are copied too. If a run averages its weights (ppo.ema_decay),
the averages are written.

format=adapter writes what a run with peft.save=adapter leaves: the adapter, which names its base,
and the head of a reward model.

format=gguf runs the converter of a checkout of llama.cpp (llama_cpp=) in a process of its own. The
file holds tokenizer, chat template and end token. Stop strings are in the template, where llama.cpp
does not read them; the command says how to give them.

The model of a checkpoint is built from the paths in its config.yaml. Left out: checkpoints of the
reward stage, which lack the mean and scale of the scores; and `llama-quantize`, which makes smaller
types than 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from rlhf import checkpoint
from rlhf.config import (
    CONFIG_FILE,
    DTYPES,
    STAGES,
    InputError,
    ModelConfig,
    PPOStageConfig,
    StageConfig,
    knob,
    load_config,
    refuse_named_code,
)
from rlhf.console import quiet_libraries, say
from rlhf.gguf_files import SUFFIX
from rlhf.hub import ADAPTER, ADAPTER_WEIGHTS, local_directory
from rlhf.option_parser import check_options, run_command

ITS_MODEL = "its model.path"  # in messages: the setting of the checkpoint's run
CONVERTER = "convert_hf_to_gguf.py"
TYPES = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
GET_IT = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"


@dataclass
class ExportOptions:
    """The command line."""

    path: str
    """checkpoint-N of an SFT or PPO run, or a model or PEFT adapter (directory or Hub id)."""
    out: str
    """Directory to write; new or empty."""
    dtype: str = knob("auto", choices=(*DTYPES, "q8_0"))
    """Type of the weights; auto keeps the stored one (gguf: 16 bits). q8_0, 8 bits, is for gguf. A
    reward model's head stays in float32."""
    trust_remote_code: bool = False
    """true: the model's own Python files, and functions named in a checkpoint's config.yaml, may
    run."""
    format: str = knob("safetensors", choices=("safetensors", "adapter", "gguf"))
    """safetensors: a Hugging Face directory, adapters merged; adapter: the LoRA adapter alone;
    gguf: a policy as one file for llama.cpp, which out=<name>.gguf names."""
    llama_cpp: str | None = None
    """format=gguf: folder of llama.cpp, which has convert_hf_to_gguf.py."""


def export(options: ExportOptions) -> None:
    """Write the directory and say how to use it."""
    check_options(options)
    path, out = Path(options.path), Path(options.out)
    if not path.exists() and "/" not in options.path:
        raise InputError(f"path={path}: no such directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out} exists and is not empty; choose another")
    converter = _converter(options)
    path = local_directory(options.path, "path", weights=False)
    import torch

    from rlhf.models import HEAD, mend_sampling_settings

    quiet_libraries()
    code = options.trust_remote_code
    if (path / CONFIG_FILE).is_file() and not (path / checkpoint.RECORD).is_file():
        model, tokenizer, record = load_checkpoint(path, code, merges=options.format != "adapter")
    else:
        record = checkpoint.require_stage(path, tuple(STAGES), "path")
        model, tokenizer = load_directory(options.path, code)
    write = model.save_pretrained
    if options.format == "adapter":
        model, write = _adapter_of(model, path, record)
    for line in mend_sampling_settings(model, trains=False):
        say(line)
    if converter is not None:
        _write_gguf(model, tokenizer, options, converter)
        return
    if options.dtype != "auto":
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{HEAD}."):  # a reward model's head stays in float32
                parameter.data = parameter.data.to(getattr(torch, options.dtype))
    if problem := checkpoint.find_non_finite(model.state_dict().items()):
        raise InputError(
            f"path={path} cannot be exported with dtype={options.dtype}: {problem}; take another "
            "checkpoint, or dtype=bfloat16 or float32 if dtype=float16 cannot hold its weights"
        )
    again = checkpoint.disk_errors(out.parent, "give the same command again")
    with again, checkpoint.complete_or_nothing(out) as temporary:
        write(temporary)
        tokenizer.save_pretrained(temporary)
        if (path / CONFIG_FILE).is_file():
            shutil.copyfile(path / CONFIG_FILE, temporary / CONFIG_FILE)
        if record is not None:
            checkpoint.write_record(temporary, record, model)
    _say_result(model, out)


def _adapter_of(model: Any, path: Path, record: Any) -> tuple[Any, Callable[[Path], None]]:
    """The plain model around an adapter, and a function that writes the adapter into a directory.

    Args:
        model: with adapters, of a checkpoint; else that of the directory `path`, merged.
    """
    from peft import PeftModel

    from rlhf.models import adapter_writer

    if isinstance(model, PeftModel):  # of a checkpoint
        if record.parent is None:
            raise InputError(f"path={path} has a base that is in no file; leave out format=adapter")
        return model.get_base_model(), adapter_writer(model, record.parent, record.revision)
    found = checkpoint.adapters_in(path)
    if not found:
        raise InputError(
            f"path={path} holds no adapter; leave out format=adapter, or train with peft=lora "
            "(and peft.save=both or adapter)"
        )

    def write(directory: Path) -> None:
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            shutil.copyfile(found[0] / name, directory / name)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)

    return model, write


# --- GGUF -----------------------------------------------------------------------------------------


def _converter(options: ExportOptions) -> Path | None:
    """llama.cpp's converter, where the format needs it; no model is loaded."""
    out = Path(options.out)
    if options.format == "gguf":
        if out.suffix != SUFFIX or out.is_dir():
            raise InputError(f"out={out} is the file of format=gguf; give out={out}{SUFFIX}")
        return find_converter(options.llama_cpp)
    if options.format == "adapter" and options.dtype != "auto":
        raise InputError(f"dtype={options.dtype} is for merged weights; leave it out")
    if options.dtype == "q8_0" or options.llama_cpp or out.suffix == SUFFIX:
        raise InputError("dtype=q8_0, llama_cpp= and out=<name>.gguf need format=gguf; add it")
    return None


def _write_gguf(model: Any, tokenizer: Any, options: ExportOptions, converter: Path) -> None:
    """Write the directory that the converter reads, and convert it."""
    from rlhf.models import parameter_count
    from rlhf.tokenizer import stop_strings

    out, name = Path(options.out), type(model).__name__
    if name.endswith("ForSequenceClassification"):
        raise InputError(f"path={options.path} is a reward model; format=gguf is for policies")
    with checkpoint.disk_errors(out.parent, "give the same command again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            convert(Path(folder), out, options.dtype, converter)
    size, number = out.stat().st_size / 1e6, parameter_count(model)[0]
    say(f"saved {out}: {name}, {number:,} parameters, dtype={options.dtype}, {size:,.1f} MB")
    stops = stop_strings(tokenizer)
    ends = "".join(f" -r {_in_shell(stop)}" for stop in stops)
    say(f"  llama-cli -m {out} --jinja{ends}")
    asked = f'   (requests need "stop": {json.dumps(stops)})' if stops else ""
    say(f"  llama-server -m {out} --jinja{asked}")


def _in_shell(text: str) -> str:
    """A text as bash reads it, in one line."""
    quoted = shlex.quote(text)
    return f"$'{text.encode('unicode_escape').decode()}'" if quoted == f"'{text}'" else quoted


def find_converter(llama_cpp: str | None) -> Path:
    """Find the converter in a checkout of llama.cpp."""
    if llama_cpp is None:
        raise InputError(
            f"format=gguf needs llama.cpp's converter: {GET_IT}, then add llama_cpp=llama.cpp"
        )
    given = Path(llama_cpp).expanduser()
    file = given if given.name == CONVERTER else given / CONVERTER
    if not file.is_file():
        raise InputError(f"llama_cpp={llama_cpp} has no {CONVERTER}; get llama.cpp: {GET_IT}")
    return file.resolve()


def convert(directory: Path, out: Path, dtype: str, converter: Path) -> None:
    """Write the GGUF file of a model directory; it is whole or not there.

    Args:
        directory: a copy, whose config.json is changed.
        dtype: a key of `TYPES`; auto takes 16 bits.
    """
    _add_old_names(directory / "config.json")
    part = out.with_name(f".{out.name}.{os.getpid()}")
    command = [sys.executable, str(converter), str(directory), "--outfile", str(part)]
    command += ["--outtype", TYPES[dtype], "--model-name", out.stem]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    try:
        if done.returncode or not part.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"status {done.returncode}"
            fix = ""
            if "No module named" in reason:
                fix = f"; pip install -r {converter.parent}/requirements.txt has what it needs"
            if "BPE pre-tokenizer was not recognized" in done.stderr:
                fix = "; llama.cpp does not know this tokenizer"
            raise InputError(f"{converter} refuses the model: {reason}{fix}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _add_old_names(file: Path) -> None:
    """Add to the config of GPT-NeoX what transformers 5 renamed and the converter still reads.

    transformers would drop the old names again; without `model_type` it refuses the file, and the
    converter reads it as it is.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "gpt_neox" and "partial_rotary_factor" in rope:
        config["rotary_pct"] = rope["partial_rotary_factor"]
        del config["model_type"]
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- What is exported ---------------------------------------------------------------------------


def load_checkpoint(
    path: Path, trust_remote_code: bool = False, merges: bool = True
) -> tuple[Any, Any, Any]:
    """Build the policy that a checkpoint of an SFT or PPO run holds.

    Only `trust_remote_code` decides whether Python files of the model, and a function that makes
    the tokenizer, may run; the value in config.yaml is ignored.

    Returns:
        Plain model, tokenizer, and a `StageRecord` for it.

    Raises:
        InputError: the checkpoint is damaged or of the reward stage, the model that its run started
            from is gone, or the model's code would have to run.
    """
    from rlhf import models
    from rlhf.checkpoint import find_damage, make_record, read_manifest, read_record, step_of
    from rlhf.checkpoint.started_from import require_same_base
    from rlhf.tokenizer import load_tokenizer

    if damage := find_damage(path):
        raise InputError(f"path={path} is damaged or incomplete: {damage}; take another checkpoint")
    stage = ((read_manifest(path) or {}).get("run") or {}).get("stage")
    if stage not in ("sft", "ppo"):
        raise InputError(
            f"path={path} is a checkpoint of the {stage} stage; only sft and ppo checkpoints can "
            "be exported. Finish the run with resume=true and use its final/"
        )
    config = load_config(STAGES[stage], path / CONFIG_FILE)
    config.model.trust_remote_code = trust_remote_code
    if not trust_remote_code:
        refuse_named_code({"model.tokenizer": config.model.tokenizer}, path / CONFIG_FILE)
    require_same_base(path.parent, config)
    try:
        tokenizer = load_tokenizer(config.model, ITS_MODEL)
        model = _policy_of(path, stage, config, tokenizer)
        model = models.merged(model) if merges else model
    except InputError as error:
        raise InputError(
            f"{path}: {error}. The paths in its {CONFIG_FILE} start from the folder where the run "
            "was started: export from that folder"
        ) from error
    sources = (path.parent / "final", Path(str(config.model.path)))
    known = [record.prompts for record in map(read_record, sources) if record is not None]
    prompts = next(iter(known), None)
    record = make_record(stage, config, config.model.path, tokenizer, prompts)
    record.metrics = {"update" if stage == "ppo" else "step": step_of(path)}
    return model, tokenizer, record


def _policy_of(path: Path, stage: str, config: StageConfig, tokenizer: Any) -> Any:
    """Build the model as the stage does, and load the weights of the checkpoint into it."""
    import torch
    from safetensors.torch import load_file

    from rlhf import models
    from rlhf.checkpoint.state import load_modules
    from rlhf.hf_trainer.sharded_trainer import MODEL, holds_slices

    in_slices = stage == "sft" and holds_slices(path)
    if stage == "sft" and not (config.peft.enabled or in_slices):  # the Trainer saves all of it
        own = dataclasses.replace(config.model, path=str(path), revision=None)
        return models.load_policy(own, tokenizer, "path")
    torch.manual_seed(config.seed)  # a model from model.config has random weights
    model: Any = models.load_policy(config.model, tokenizer, ITS_MODEL)
    if config.peft.enabled:
        rows = models.new_token_rows(tokenizer, config.model, config.peft)
        model = models.add_lora(model, config.peft, "CAUSAL_LM", config.seed, rows)
    if in_slices:
        load_modules(path, {MODEL: model})
    elif stage == "sft":
        models.load_adapter(model, load_file(path / "adapter_model.safetensors"), f"path={path}")
    else:
        averaged = checkpoint.holds_tensors(path, "averages")
        load_modules(path, {"averages" if averaged else "policy": model})
        ppo = cast(PPOStageConfig, config).ppo
        models.sample_as_trained(models.unwrap_peft(model), ppo.temperature, ppo.top_p, ppo.top_k)
    return model


def load_directory(path: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a policy or reward model with its adapters merged, and its unchanged tokenizer."""
    from rlhf.hub import find_source
    from rlhf.models import load_policy, load_reward_model
    from rlhf.tokenizer import read_tokenizer

    is_classifier = find_source(path, "path", code=trust_remote_code).is_classifier
    config = ModelConfig(path=path, dtype="auto", trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(config, "path")
    if is_classifier:
        return load_reward_model(config, "path", encoders=True), tokenizer
    return load_policy(config, tokenizer, "path"), tokenizer


def _say_result(model: Any, out: Path) -> None:
    from rlhf.models import parameter_count

    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    if (out / ADAPTER).is_file():
        base = json.loads((out / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        say(f"saved {out}: an adapter on {base}, {size:,.1f} MB")
        say(f'  PeftModel.from_pretrained(model, "{out}")    # model: that base')
        return
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
