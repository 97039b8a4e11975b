"""Sampling settings of a model: training ignores them, `final/` keeps the valid ones.

transformers loads settings that it later refuses to save (Vicuna and Llama 2 give a temperature
without do_sample=true), so a stage corrects them when it starts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

from rlhf.config import InputError

# Settings that have an effect only if do_sample is true.
SAMPLING = "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
# Other settings are valid only together with these.
ENABLING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
# Settings that change neither the distribution of tokens nor the choice from it.
NEUTRAL = """bos_token_id eos_token_id pad_token_id transformers_version use_cache max_length
max_new_tokens return_dict_in_generate cache_implementation output_attentions output_hidden_states
output_scores output_logits""".split()


def sampling_settings(model: Any) -> dict[str, Any]:
    """Return the settings of a model's generation config that change which tokens are chosen;
    those with the default of transformers are left out."""
    settings = model.generation_config
    plain = settings._get_default_generation_params()
    return {
        name: value
        for name, value in settings.to_diff_dict().items()
        if name not in NEUTRAL and name[:1] != "_" and value != plain.get(name)
    }


def require_numbers(settings: Any, label: str) -> None:
    """Refuse a generation config whose sampling settings are no numbers: transformers loads them.

    Args:
        label: names the model in the message.
    """
    for name in (*SAMPLING, "do_sample"):
        value = getattr(settings, name, None)
        expected = "true or false" if name == "do_sample" else "a finite number"
        is_number = isinstance(value, int | float) and math.isfinite(value)
        is_right = isinstance(value, bool) if name == "do_sample" else is_number
        if value is not None and not is_right:
            raise InputError(
                f"{label}: {name} in its generation_config.json must be {expected}, got "
                f"{value!r}; correct it there"
            )


def mend_sampling_settings(model: Any, trains: bool = True) -> list[str]:
    """Make the generation config of a model valid, so that it can be saved, in place.

    Sampling settings without `do_sample` imply `do_sample=true`. They are dropped if decoding is
    greedy, by `do_sample=false` or a temperature of 0.

    Args:
        trains: also say which settings are kept, because training does not use them.

    Returns:
        Lines that say what was changed and what is kept; [] if the model has no settings.
    """
    settings, lines = getattr(model, "generation_config", None), []
    if settings is None:  # a reward model
        return []
    own = {k: v for k, v in sampling_settings(model).items() if k in SAMPLING}
    if settings.temperature is not None and settings.temperature <= 0:
        settings.do_sample = False
    if own and settings.do_sample is False:
        _reset(settings, own)
        lines.append(f"dropped {_list(own)}: greedy decoding does not use them")
    elif own and settings.do_sample is None:
        settings.do_sample = True
        lines.append(f"set do_sample=True, which {_list(own)} needs")
    lines += _drop_refused(settings)
    kept = sampling_settings(model)
    if kept and trains:
        lines.append(f"saved with the model, but not used in training: {_list(kept)}")
    return [f"generation config: {line}" for line in lines]


def sample_as_trained(model: Any, temperature: float, top_p: float, top_k: int) -> list[str]:
    """Replace the sampling settings of a generation config by those of PPO, in place.

    Returns:
        A line that says which settings of the model are replaced; [] if it has none.
    """
    own, settings = sampling_settings(model), model.generation_config
    _reset(settings, own)
    settings.do_sample, settings.temperature = True, temperature
    settings.top_p, settings.top_k = top_p, top_k  # without a top_k, transformers would use 50
    lines = _drop_refused(settings)
    ours = f"do_sample=True, temperature={temperature}, top_p={top_p}, top_k={top_k}"
    if own:
        lines.append(f"final/ gets PPO's own {ours} instead of {_list(own)}")
    return [f"generation config: {line}" for line in lines]


def _drop_refused(settings: Any) -> list[str]:
    """Reset the settings that transformers refuses to save; add one at a time to find them."""
    trial, refused = type(settings)(), {}
    given = {k: v for k, v in vars(settings).items() if k[0] != "_" and v is not None}
    for name in sorted(given, key=lambda name: name not in ENABLING):
        before = copy.copy(trial)
        setattr(trial, name, given[name])
        try:
            trial.validate(strict=True)
        except (ValueError, TypeError):
            trial, refused[name] = before, given[name]
    _reset(settings, refused)
    return [f"dropped {_list(refused)}: transformers refuses to save it"] if refused else []


def _reset(settings: Any, names: Iterable[str]) -> None:
    plain = type(settings)()
    for name in names:
        setattr(settings, name, getattr(plain, name, None))


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
