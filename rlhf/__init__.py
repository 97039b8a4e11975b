"""RLHF on the Hugging Face stack: supervised fine-tuning, reward model, PPO.

The public names below are imported on first use, so that `import rlhf` costs nothing and the
command lines (`python -m rlhf.sft`, `rlhf.reward`, `rlhf.ppo`) answer `--help` at once. Everything
else is reached through its module: `from rlhf.functional import gae`.

    from rlhf import PPOTrainer, load_scorer
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from rlhf.config import (
        CheckpointConfig,
        CriticConfig,
        DatasetConfig,
        EndpointConfig,
        EvaluationConfig,
        InputError,
        MixConfig,
        ModelConfig,
        NormalizationConfig,
        PeftConfig,
        PPOConfig,
        PPOStageConfig,
        PtxConfig,
        RewardConfig,
        RewardStageConfig,
        SamplingConfig,
        ScorerComponent,
        ScorerConfig,
        SFTStageConfig,
        TrackerConfig,
        WatchdogConfig,
    )
    from rlhf.ppo.result import PPOResult
    from rlhf.ppo.stage import train_ppo
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.reward.stage import RewardResult, train_reward
    from rlhf.scorers import load_scorer
    from rlhf.sft.stage import SFTResult, train_sft

__version__ = "0.1.0"
__all__ = [
    "CheckpointConfig",
    "CriticConfig",
    "DatasetConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "InputError",
    "MixConfig",
    "ModelConfig",
    "NormalizationConfig",
    "PPOConfig",
    "PPOResult",
    "PPOStageConfig",
    "PPOTrainer",
    "PeftConfig",
    "PtxConfig",
    "RewardConfig",
    "RewardResult",
    "RewardStageConfig",
    "SFTResult",
    "SFTStageConfig",
    "SamplingConfig",
    "ScorerComponent",
    "ScorerConfig",
    "TrackerConfig",
    "WatchdogConfig",
    "load_scorer",
    "train_ppo",
    "train_reward",
    "train_sft",
]

# It logs as soon as PEFT is imported, and at each 8-bit product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# where names are imported from that are not configuration
_MODULES = {
    "PPOResult": "rlhf.ppo.result",
    "PPOTrainer": "rlhf.ppo.trainer",
    "train_ppo": "rlhf.ppo.stage",
    **dict.fromkeys(["RewardResult", "train_reward"], "rlhf.reward.stage"),
    **dict.fromkeys(["SFTResult", "train_sft"], "rlhf.sft.stage"),
    "load_scorer": "rlhf.scorers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "rlhf.config")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
