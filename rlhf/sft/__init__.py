"""Supervised fine-tuning: `python -m rlhf.sft`, or `train_sft(SFTStageConfig(...))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.sft.stage import SFTResult, train_sft

__all__ = ["SFTResult", "train_sft"]


def __getattr__(name: str) -> Any:  # keeps `--help` and `--cfg job` free of torch
    if name in __all__:
        from rlhf.sft import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
