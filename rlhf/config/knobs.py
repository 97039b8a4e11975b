"""The dataclasses of the three stages: every knob with its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
ADVANTAGES = ("gae", "rloo", "grpo", "reinforce_pp")
COMBINATIONS = ("weighted_sum", "mean", "min", "mean_minus_std")
COMPLETIONS = ("samples", "demonstrations", "ranked")
NORMALIZATIONS = ("demo_mean_zero", "standardise", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class InputError(ValueError):
    """Bad input from the user; the message: what was given, what was expected, how to fix it."""


class MissingValues(InputError):
    """Values that have no default and were not given."""


@dataclass
class ModelConfig:
    """Which model to start from, and how it is loaded."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None
    stop_strings: list[str] | None = None
    special_tokens: list[str] = field(default_factory=list)
    eos_token: str | None = None
    pad_token: str | None = None
    shrink_embeddings: bool = False
    dtype: str = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    quantization: str | None = None
    dropout: float | None = None
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Which rows to read, and which function makes them canonical."""

    path: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    format: str = "messages"
    as_conversation: bool = False
    eval_fraction: float = 0.05
    max_rows: int | None = None
    max_eval_rows: int | None = None
    max_length: int = 1024
    on_bad_row: str = "drop"
    split_long: bool = False


@dataclass
class PeftConfig:
    """LoRA adapters instead of full fine-tuning."""

    enabled: bool = False
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | None = None
    train_new_tokens: bool | str = "auto"


@dataclass
class TrackerConfig:
    """Where metrics go beside `metrics.jsonl`."""

    name: str = "none"
    project: str = "rlhf"
    entity: str | None = None
    mode: str | None = None


@dataclass
class CheckpointConfig:
    """When a stage writes a checkpoint that it can resume from."""

    every: int = 200
    keep_last: int = 2
    grace_seconds: float = 60.0


@dataclass
class StageConfig:
    """What the three stages have in common."""

    run_name: str = "run"
    runs_dir: str = "runs"
    seed: int = 1
    resume: bool | str = False
    overwrite: bool = False
    precision: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def stage_dir(self, stage: str) -> Path:
        """Directory of `stage` in this run: `runs_dir/run_name/stage`."""
        return Path(self.runs_dir) / self.run_name / stage


@dataclass
class MixConfig:
    """Plain text that SFT trains on beside the rows."""

    path: str | None = None
    split: str = "train"
    format: str = "text"
    fraction: float = 0.0


@dataclass
class SFTStageConfig(StageConfig):
    """`python -m rlhf.sft`."""

    train_on_prompt: bool = False
    batch_size: int | None = None
    mix: MixConfig = field(default_factory=MixConfig)
    num_samples: int = 32
    response_length: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    trainer: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 3,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "packing": False,
            "logging_steps": 10,
            "eval_steps": 200,
            "load_best_model_at_end": False,
        }
    )


@dataclass
class RewardConfig:
    """The ranking loss, its batches, and what is stored with the reward model."""

    loss: str = "pairwise"
    margin: float | None = None
    margin_scale: float = 0.0
    label_smoothing: float = 0.0
    center_coef: float = 0.0
    tokens_per_batch: int | None = None
    num_normalization_prompts: int = 256


@dataclass
class NormalizationConfig:
    """The completions whose scores' mean and standard deviation the reward stage stores."""

    completions: str = "samples"
    path: str | None = None
    split: str = "train"
    format: str = "messages"
    response_length: int = 128


@dataclass
class RewardStageConfig(StageConfig):
    """`python -m rlhf.reward`."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    batch_size: int | None = None
    trainer: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 1,
            "learning_rate": 9e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "logging_steps": 10,
            "eval_steps": 200,
            "load_best_model_at_end": False,
        }
    )


@dataclass
class ScorerComponent:
    """One of several scorers; `normalize` falls back to that of `ScorerConfig`, `name` to one that
    is made from `path`; for `gate` see `rlhf.functional.counting`."""

    path: str | None = None
    weight: float = 1.0
    normalize: str | None = None
    name: str | None = None
    gate: float | None = None

    @property
    def label(self) -> str:
        """Name in metrics: that of the run, of the directory or of the Python function."""
        if self.name is not None:
            return self.name
        path = str(self.path)
        if path.startswith("python:"):
            return path.rpartition(".")[2]
        parts = [part for part in Path(path).parts if part not in ("reward", "final")]
        return parts[-1] if parts else path


@dataclass
class ScorerConfig:
    """What scores a response: `path`, or several `components`."""

    path: str | None = None
    normalize: str = "demo_mean_zero"
    batch_size: int = 32
    components: list[ScorerComponent] = field(default_factory=list)
    combine: str = "weighted_sum"
    std_coef: float = 1.0

    def of_component(self, component: ScorerComponent) -> ScorerConfig:
        """Configuration of one component as a scorer of its own."""
        return ScorerConfig(component.path, component.normalize or self.normalize, self.batch_size)


@dataclass
class CriticConfig:
    """The value model."""

    init: str = "reward"
    learning_rate: float = 3e-6
    warmup_updates: int = 0


@dataclass
class PPOConfig:
    """The algorithm; names are those of TRL's late PPOConfig where one existed."""

    num_updates: int = 200
    batch_size: int = 64
    samples_per_prompt: int = 1
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    micro_batch_size: int = 8
    rollout_batch_size: int = 64
    max_prompt_length: int | None = None
    response_length: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    allow_off_policy_sampling: bool = False
    missing_eos_penalty: float | None = -1.0
    mask_truncated: bool = False
    scale_scores: bool = False
    whiten_scores: bool = False
    clip_scores: float | None = None
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10000
    whiten_rewards: bool = False
    advantage: str = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool | None = None
    cliprange: float = 0.2
    dual_clip: float | None = None
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    target_kl: float | None = None
    learning_rate: float = 3e-6
    lr_schedule: str = "linear"
    lr_warmup_updates: int = 0
    lr_warmup_start: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    save_rollouts: int | None = None


@dataclass
class PtxConfig:
    """Text that PPO-ptx keeps the policy good at."""

    coef: float = 0.0
    path: str | None = None
    split: str = "train"
    format: str = "text"
    batch_size: int = 64
    max_length: int = 512


@dataclass
class EvaluationConfig:
    """Held-out evaluation during and after PPO, and which update becomes `final/`."""

    every: int = 20
    num_prompts: int = 64
    scorer: str | None = None
    select: str = "score_minus_kl"
    select_kl_coef: float | None = None


@dataclass
class WatchdogConfig:
    """Thresholds beyond which PPO warns (`kl_budget`: stops); None turns a rule off."""

    first_ratio: float | None = 1e-3
    ratio: float | None = 100.0
    clip_fraction: float | None = 0.3
    negative_kl: float | None = 3.0
    kl_budget: float | None = None
    entropy_drop: float | None = 0.2
    explained_variance: float | None = -0.5
    eos_rate: float | None = 0.5
    length_drift: float | None = 2.0
    score_std: float | None = 1e-4
    grad_norm: float | None = 100.0
    sampler_gap: float | None = 0.5


@dataclass
class PPOStageConfig(StageConfig):
    """`python -m rlhf.ppo`."""

    preflight: bool | str = True
    ppo: PPOConfig = field(default_factory=PPOConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=20))


STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTStageConfig,
    "reward": RewardStageConfig,
    "ppo": PPOStageConfig,
}
