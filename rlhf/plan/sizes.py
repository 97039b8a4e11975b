"""Configurations of known models by name, and of any model by its path. No weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import InputError, nearest
from rlhf.hub import call_loader, config_directory, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _llama(hidden: int, wide: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
    } | others


def _pythia(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
    }


# The values of each model's config.json. OPT has the shapes of GPT-3 at the same size.
SIZES: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-2-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "pythia-12b": _pythia(5120, 36, 40, 50688),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "gpt-j-6b": {"model_type": "gptj"},  # the defaults of transformers
    "falcon-7b": {"model_type": "falcon"},
    "smollm2-135m": _llama(
        576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True
    ),
}


def find_settings(model: str) -> PreTrainedConfig:
    """Return the configuration of a named size, a config.json, a directory or a Hub id.

    Raises:
        InputError: there is no such model, or it is no causal language model of transformers.
    """
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if model not in SIZES and not path.is_dir() and "/" not in model:
        hint = nearest(model, SIZES)
        raise InputError(
            f"model={model} is neither a known size nor a directory.{hint} Known: "
            f"{', '.join(SIZES)}; or give a directory, a config.json or a Hub id"
        )
    from transformers import AutoConfig

    if model in SIZES:
        return AutoConfig.for_model(**SIZES[model])
    directory = config_directory(str(path) if path.is_dir() else model, "model", None, False)
    _require_known(read_json(directory / "config.json"), model)
    return call_loader(AutoConfig.from_pretrained, directory, f"model={model}", False)


def _require_known(given: dict[str, Any], model: str) -> None:
    """Refuse a family whose code transformers does not have, or that predicts no next token."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = given.get("model_type")
    if given.get("auto_map") and family not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model={model} needs Python code of its own, which is not run here; give the "
            "config.json of a family that transformers has, with its sizes"
        )
    is_known = family in CONFIG_MAPPING_NAMES
    if is_known and (
        family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or given.get("is_encoder_decoder")
    ):
        raise InputError(
            f"model={model}: model_type={family} is no causal language model, which all stages "
            "train"
        )
