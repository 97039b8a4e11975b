"""A model without its weights, on which settings are tried before the weights load.

Only the configuration file is read. A model that cannot be built this way, such as one whose own
code needs real numbers, is tried when its weights have been loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf.config import ModelConfig, PeftConfig
from rlhf.hub.snapshot import call_loader
from rlhf.hub.source import config_directory
from rlhf.models.adapters import with_lora
from rlhf.models.dropout import set_dropout


def try_settings(
    config: ModelConfig, peft: PeftConfig, task_type: str = "CAUSAL_LM", field: str = "model.path"
) -> None:
    """Try `model.dropout` and the adapters of `peft` on the skeleton of a model.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        field: configuration key of `config.path`.

    Raises:
        InputError: the model has no dropout, or no layers as `peft` names them.
    """
    if config.dropout is None and not peft.enabled:
        return
    model = _skeleton(config, task_type, field)
    if model is None:
        return
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if peft.enabled:
        with_lora(model, peft, task_type)


def _skeleton(config: ModelConfig, task_type: str, field: str) -> PreTrainedModel | None:
    """Build a model on the meta device; None where that fails, for a reason that loading tells."""
    code = config.trust_remote_code
    try:
        if config.path is None:
            settings: Any = AutoConfig.for_model(**config.config)
        else:
            directory = config_directory(config.path, field, config.revision, code)
            load = AutoConfig.from_pretrained
            settings = call_loader(load, directory, f"{field}={config.path}", code)
        factory: Any = AutoModelForCausalLM
        if task_type == "SEQ_CLS":
            factory, settings.num_labels = AutoModelForSequenceClassification, 1
        with torch.device("meta"):
            return factory.from_config(settings, trust_remote_code=code)
    except (
        Exception
    ):  # whatever a model's own code raises without numbers; loading repeats the rest
        return None
