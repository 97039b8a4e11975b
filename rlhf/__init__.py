"""RLHF on the Hugging Face stack: supervised fine-tuning, reward model, PPO.

The public names below are imported on first use, so that `import rlhf` costs nothing and the
command lines (`python -m rlhf.sft`, `rlhf.reward`, `rlhf.ppo`) answer `--help` at once. Everything
else is reached through its module: `from rlhf.functional import gae`.

    from rlhf import PPOTrainer, load_scorer
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "rlhf.config",
    "PPOConfig": "rlhf.config",
    "PPOStageConfig": "rlhf.config",
    "PPOTrainer": "rlhf.ppo",
    "RewardStageConfig": "rlhf.config",
    "SFTStageConfig": "rlhf.config",
    "ScorerComponent": "rlhf.config",
    "ScorerConfig": "rlhf.config",
    "load_scorer": "rlhf.scorers",
    "train_ppo": "rlhf.ppo",
    "train_reward": "rlhf.reward",
    "train_sft": "rlhf.sft",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
