"""Knobs that all three stages have: model, data, adapters, tracker, checkpoints, and the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.fields import group, knob, knobs, over_defaults

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Names of accelerate's trackers.
TRACKERS = (
    *("aim", "clearml", "comet_ml", "dvclive", "mlflow"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
YEAR = 365 * 24 * 3600  # seconds


@knobs
class ModelConfig:
    """Which model to start from, and how it is loaded."""

    path: str | None = None
    """Hub id, directory or GGUF file, also owner/name/file.gguf of the Hub (null: reward and ppo
    start from this run's SFT stage)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    config: dict[str, Any] = knob({}, infinite=True)
    """Without a path: values of a new model with random weights, e.g. {model_type: llama}."""
    tokenizer: str | None = None
    """Hub id, directory or python:module.function (null: same as path)."""
    chat_template: str | None = None
    """A name that the tokenizer or conf/chat_template has, a .jinja file, or the template's text
    (null: the tokenizer's own, by default the one named "default"; plain if it has none)."""
    stop_strings: list[str] | None = None
    """Texts that end an answer in addition to EOS, e.g. ["### End"], saved with the template (null:
    what the template declares; []: none). On the command line, write a real line break, not \\n."""
    special_tokens: list[str] = knob([])
    """Tokens to add to the tokenizer, each as one id, e.g. ["### End"]."""
    eos_token: str | None = None
    """Replaces the tokenizer's EOS token, e.g. "### End"; must be one id (null: the tokenizer's
    own; SFT on conversations takes the token that ends every answer in the template)."""
    pad_token: str | None = None
    """Replaces the tokenizer's pad token; must be one id, EOS included (null: its own, else EOS).
    A reward model replaces one that ends answers by another id of its vocabulary."""
    shrink_embeddings: bool = False
    """Cut embedding rows beyond the tokenizer's ids, e.g. Pythia's (false: tables only grow)."""
    dtype: str = knob("float32", choices=DTYPES)
    """Type of the weights in memory; auto: as stored. Training needs float32."""
    attn_implementation: str | None = None
    """Attention code: eager, sdpa or flash_attention_2 (null: the library's choice)."""
    forward: str = knob("auto", choices=("auto", "padding_free", "padded"))
    """How rows are read in training and scoring: without padding, one after the other, or padded to
    the longest; auto: without, if that leaves the model's numbers as they are (measured)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    quantization: str | None = knob(None, choices=("8bit", "4bit"))
    """Store linear layers in bitsandbytes' 8bit or 4bit (nf4) below LoRA adapters; final/ is not
    quantised (null: off). Needs pip install 'rlhf[quant]'. Use 4bit for PPO: with 8bit, log-probs
    depend on the other rows of a batch."""
    dropout: float | None = knob(None, ge=0, lt=1)
    """Rate of every dropout layer in SFT and reward training; final/ keeps the rates of the model's
    config, and PPO uses no dropout (null: the config's own rates)."""
    trust_remote_code: bool = False
    """Run code that comes with a Hub model."""


@knobs
class DatasetConfig:
    """Which rows to read, and in which format they are."""

    path: Any = None
    """File (json, jsonl, csv, parquet, also .gz or .zst), pattern such as data/*.jsonl, directory,
    Hub name, a list of these, or python:module.function."""
    subset: str | None = None
    """Subset (configuration) of a Hub name."""
    split: str = "train"
    """Split of a Hub name."""
    eval_path: Any = None
    """Held-out rows, read like path (null: hold out eval_fraction of the prompts of path)."""
    eval_split: str = "test"
    """Split of eval_path when that is a Hub name."""
    format: str | None = None
    """Name of a format, or your own function my_module.my_format(row) -> canonical row; null: found
    from the columns of the rows. dataset=<format> (alpaca, ranked, ...) sets this knob only."""
    columns: dict[str, str] = knob({})
    """Columns under the names that a format reads: dataset.columns.prompt=question; b in a is
    a.b."""
    as_conversation: bool | None = None
    """Make a text prompt a user turn and a text completion the answer, for the chat template (null:
    if the stage that model.path comes from was trained on conversations)."""
    eval_fraction: float = knob(0.05, ge=0, le=0.9)
    """Share of the prompts that is held out when eval_path is null; the seed decides which."""
    max_rows: int | None = knob(None, ge=1)
    """Number of training rows to keep, the first after the split; of these, rows longer than
    max_length are dropped and not replaced (null: all)."""
    max_eval_rows: int | None = knob(None, ge=1)
    """Number of held-out rows to keep, as max_rows (null: all)."""
    max_length: int | None = knob(None, ge=2)
    """Longest row with its prompt, tokens; longer rows are dropped and counted (null: what the
    model takes, at most 1024)."""
    on_bad_row: str = knob("drop", choices=("drop", "stop"))
    """At a row that is malformed (not JSON, a field missing or of the wrong type) or that the chat
    template refuses: drop it (count it, show the first of each kind, and stop if half of the rows
    or more are malformed), or stop."""
    split_long: bool = False
    """sft: split a conversation that is too long between rounds; each piece repeats the system
    message and the template's preamble. Held-out rows are chosen before."""


@knobs
class PeftConfig:
    """LoRA adapters (Hu et al. 2021, arXiv 2106.09685)."""

    enabled: bool = False
    """Train LoRA adapters instead of all weights; peft=lora sets this to true."""
    r: int = knob(16, ge=1)
    """Rank of the adapters."""
    alpha: int = 32
    """The adapters' output is scaled by alpha / r."""
    dropout: float = knob(0.0, ge=0, le=1)
    """Dropout rate of the adapters' input; PPO switches it off."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get adapters (null: all except the output head)."""
    train_new_tokens: bool | str = knob("auto", choices=(True, False, "auto"))
    """Also train the rows of model.special_tokens in both embedding tables; auto: if one of these
    tokens is the EOS token, a stop string or part of the chat template."""
    save: str = knob("both", choices=("merged", "adapter", "both"))
    """What final/ holds (ppo: critic/ too): merged: a plain model, in the type in which its base is
    stored; both: also the adapter, in final/adapter/; adapter: the adapter alone, in final/ itself,
    which needs its base where it is now."""


@knobs
class TrackerConfig:
    """Where metrics go in addition to metrics.jsonl."""

    names: list[str] = knob([], choices=TRACKERS)
    """Trackers, e.g. [wandb,tensorboard]; each needs its package (pip install)."""
    project: str = "rlhf"
    """Project in the trackers."""
    entity: str | None = None
    """wandb: team or user that owns the project (null: your default)."""
    mode: str | None = knob(None, choices=("online", "offline", "disabled"))
    """wandb: online, offline or disabled (null: what WANDB_MODE says, else online)."""


@knobs
class CheckpointConfig:
    """When a stage writes a checkpoint that it can resume from."""

    every: int | None = knob(None, ge=1)
    """Optimiser steps (ppo: updates) between two checkpoints (null: 200 steps, 20 updates); the
    last step has one too."""
    keep_last: int = knob(2, ge=1)
    """Number of checkpoints to keep, to resume from; the best one is kept in addition."""
    background: bool | None = None
    """ppo: write a checkpoint while the next rollout samples, from a copy of weights and optimiser
    states in main memory (null: on a GPU)."""
    grace_seconds: float = knob(60.0, gt=0, le=YEAR)
    """Seconds to finish the step and save after SIGTERM, SIGHUP or Ctrl-C; then the stage exits
    without saving. resume=auto waits as long for a run that still writes to the directory."""


@knobs
class StageConfig:
    """What the three stages have in common."""

    run_name: str = "run"
    """Name of the run; each stage has its own folder in runs_dir/run_name/."""
    runs_dir: str = "runs"
    """Directory that holds all runs."""
    seed: int = 1
    """Seed of the data split, of initialisation, of the order of rows and of sampling."""
    resume: bool | str = knob(False, choices=(True, False, "auto"))
    """true: continue the run from its newest intact checkpoint, with its config.yaml and what the
    command line changes; auto: the same if the run exists, else start it."""
    overwrite: bool = False
    """Delete what this stage wrote for run_name and start afresh."""
    precision: str = knob("auto", choices=("auto", "float32", "bfloat16"))
    """Forward passes in float32 or bfloat16 (autocast); auto: bfloat16 on a GPU that has it."""
    distributed: str | None = knob(
        None, choices=("fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload")
    )
    """Under torchrun: shard what trains over the processes, as conf/accelerate/<name>.yaml says
    (null: whole models on each, or what accelerate launch says)."""
    distributed_timeout: int = knob(1800, ge=1)
    """Seconds that a process waits for another one before the run ends with an error."""
    model: ModelConfig = group(ModelConfig)
    dataset: DatasetConfig = group(DatasetConfig)
    peft: PeftConfig = group(PeftConfig)
    tracker: TrackerConfig = group(TrackerConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; a mapping for a group changes only the knobs that it names."""
        super().__setattr__(name, over_defaults(type(self), name, value))

    def stage_dir(self, stage: str) -> Path:
        """Directory of `stage` in this run: `runs_dir/run_name/stage`."""
        return Path(self.runs_dir) / self.run_name / stage

    @property
    def checkpoint_every(self) -> int:
        """`checkpoint.every`, with a value for null."""
        return self.checkpoint.every or 200

    @property
    def needs_eval(self) -> bool:
        """True if the stage cannot do without held-out rows."""
        return True


@knobs
class TrainerDefaults:
    """Our defaults of the mapping `trainer:`, which accepts every other argument too."""

    num_train_epochs: float = 3
    """Passes over the training rows."""
    learning_rate: float | None = None
    """Peak learning rate (null: 2e-5, with LoRA adapters 2e-4)."""
    lr_scheduler_type: str = "cosine"
    """Learning-rate schedule, by transformers' name."""
    warmup_steps: float = 0.03
    """Warm-up: below 1 a share of all optimiser steps, from 1 a number of steps."""
    per_device_train_batch_size: int = 8
    """Rows per process and forward pass."""
    per_device_eval_batch_size: int = 8
    """Rows (reward: prompts) per process and forward pass in evaluations."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
