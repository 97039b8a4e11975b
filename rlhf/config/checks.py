"""What a range cannot say about a configuration: missing values, and rules between knobs.

The range of a single knob is declared with it, see `rlhf.config.fields`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlhf.config.errors import refuse, show
from rlhf.config.fields import value_problems
from rlhf.config.knobs import (
    ModelConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    SamplingConfig,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
)
from rlhf.config.objects import has_weights
from rlhf.config.paths import default_paths
from rlhf.config.saved_config import config_file_of_run, resume_overrides
from rlhf.config.trainer_values import trainer_problems

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def check(config: StageConfig) -> None:
    """Check a stage's configuration, before anything expensive starts.

    Raises:
        InputError: names every bad and every missing value at once.
    """
    refuse(*problems_of(config))


def problems_of(config: StageConfig) -> tuple[list[str], list[str]]:
    """What is wrong in a stage's configuration, and which values are missing."""
    problems = [*value_problems(config), *_rules(config)]
    return problems or _missing_packages(config), list(_missing(config))


def _missing_packages(config: StageConfig) -> list[str]:
    problems = []
    if config.model.quantization is not None and find_spec("bitsandbytes") is None:
        problems.append(
            f"model.quantization={config.model.quantization} needs bitsandbytes, which is not "
            "installed: pip install 'rlhf[quant]', or set model.quantization=null"
        )
    missing = [name for name in config.tracker.names if find_spec(name) is None]
    for name in missing:
        package = name.replace("_", "-")
        problems.append(f"tracker {name} is not installed: pip install {package}, or tracker=none")
    return problems


def check_scorer_config(scorer: ScorerConfig) -> None:
    """Check a scorer's configuration by itself; `check` does so for the PPO stage."""
    refuse([*value_problems(scorer, "scorer"), *_scorer_rules(scorer)])


# --- Missing values -------------------------------------------------------------------------------


def _missing(config: StageConfig) -> Iterator[str]:
    if config.dataset.path is None:
        yield "dataset.path: file or Hub name of the rows, e.g. dataset.path=train.jsonl"
    if isinstance(config, SFTStageConfig):
        yield from _missing_in_sft(config)
    for key, path in default_paths(config).items():
        if not path.is_dir():
            yield f"{key}: {path} does not exist; {_way_to(path, config)}, or set {key}=<directory>"
    if isinstance(config, RewardStageConfig):
        normalization = config.normalization
        if normalization.completions == "demonstrations" and normalization.path is None:
            yield (
                "normalization.path: file or Hub name of the SFT stage's rows, e.g. "
                "normalization.path=train.jsonl normalization.format=alpaca"
            )
    if isinstance(config, PPOStageConfig):
        if config.ptx.coef > 0 and config.ptx.path is None:
            yield "ptx.path: file or Hub name of the text, e.g. ptx.path=text.jsonl"
        if config.scorer.path == "python:":
            yield "scorer.path: a function, e.g. scorer.path=my_module.my_score"
        for i, component in enumerate(config.scorer.components):
            if not component.path:
                yield f"scorer.components[{i}].path: final/ of a reward stage, or module.function"


def _way_to(final: Path, config: StageConfig) -> str:
    """How the missing result of an earlier stage is made."""
    command = f"python -m rlhf.{final.parent.name}"
    if config_file_of_run(final.parent) is not None:
        return f"finish that stage with `{command} {resume_overrides(config, 'auto')}`"
    data = "dataset.path=<rows> model.path=<model>"
    data = data if final.parent.name == "sft" else "dataset.path=<ranked rows>"
    return f"run `{command} run_name={config.run_name} {data}` first"


def _missing_in_sft(config: SFTStageConfig) -> Iterator[str]:
    model = config.model
    if model.path is None and not model.config:
        yield (
            "model.path: Hub id, directory or GGUF file, e.g. model.path=EleutherAI/pythia-410m "
            "(or model.config to train from scratch)"
        )
    if model.path is None and model.tokenizer is None:
        yield "model.tokenizer: Hub id or directory; needed when model.path is not set"
    if config.mix.fraction > 0 and config.mix.path is None:
        yield "mix.path: file or Hub name of the text, e.g. mix.path=text.jsonl"


# --- Rules: each yields a message where the configuration breaks it -------------------------------


def _rules(config: StageConfig) -> Iterator[str]:
    name = config.run_name
    if name in ("", ".", "..") or "/" in name or min(name) < " " or len(os.fsencode(name)) > 255:
        yield f"run_name must be one folder name, got {show(name)}"
    yield from _model_rules(config)
    yield from _token_rules(config.model)
    if isinstance(config, SFTStageConfig | RewardStageConfig):
        yield from trainer_problems(
            config.trainer, "reward" if isinstance(config, RewardStageConfig) else "sft"
        )
        accumulated = config.trainer.get("gradient_accumulation_steps", 1)
        if config.batch_size is not None and accumulated != 1:
            yield (
                f"batch_size={config.batch_size} sets trainer.gradient_accumulation_steps, which "
                f"is {accumulated}; leave that at 1, or set batch_size=null"
            )
    if not isinstance(config, PPOStageConfig) and config.checkpoint.background:
        yield "checkpoint.background=true: only PPO has rollouts to write behind; leave it null"
    if not isinstance(config, SFTStageConfig) and config.dataset.split_long:
        yield "dataset.split_long=true splits conversations of SFT only; set it to false"
    if isinstance(config, RewardStageConfig):
        yield from _reward_rules(config)
    if isinstance(config, PPOStageConfig):
        yield from _scorer_rules(config.scorer)
        yield from _critic_rules(config)
        yield from _rollout_rules(config.ppo)
        yield from _sampling_rules(config.sampling, config.ppo, config.peft)
        yield from _update_rules(config.ppo)
        yield from _frozen_rules(config)
        yield from _base_rules(config)
        if config.ppo.micro_batch_tokens == "auto" and not config.preflight:
            yield (
                "ppo.micro_batch_tokens=auto is chosen by the preflight, which preflight=false "
                "leaves out; set it to a number, e.g. 4096, or preflight=true"
            )
        if config.evaluation.select == "independent_score" and config.evaluation.scorer is None:
            yield "evaluation.select=independent_score needs evaluation.scorer=module.score"


def _model_rules(config: StageConfig) -> Iterator[str]:
    model, is_sft = config.model, isinstance(config, SFTStageConfig)
    attention = model.attn_implementation
    if attention is not None and attention not in ATTENTION and "/" not in attention:
        yield (
            f"model.attn_implementation must be one of {', '.join(ATTENTION)}, null, or a kernel "
            f"from the Hub, got {attention!r}"
        )
    if attention == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        yield "model.attn_implementation=flash_attention_2 needs flash-attn; install it or use sdpa"
    if model.revision is not None and model.path is not None and Path(model.path).is_dir():
        yield (
            f"model.revision={model.revision} applies to Hub models, but model.path={model.path} "
            "is a local directory; set model.revision=null"
        )
    if model.config and not (is_sft and model.path is None):
        yield (
            f"model.config={show(model.config)} builds a model with random weights, but model.path="
            f"{model.path or 'null'} loads a trained one; "
            f"{'set model.path=null, or ' if is_sft else ''}remove model.config (if a recipe sets "
            f"it: {' '.join(f'~model.config.{key}' for key in model.config)})"
        )
    if model.quantization is not None and not config.peft.enabled:
        yield (
            f"model.quantization={model.quantization}: quantised weights cannot be trained, only "
            "adapters on them; set peft=lora, or model.quantization=null"
        )
    if model.quantization is not None and model.path is None and is_sft:
        yield f"model.quantization={model.quantization} needs pretrained weights: set model.path"
    if config.peft.enabled and config.peft.save == "adapter" and model.path is None and is_sft:
        yield (
            "peft.save=adapter needs a base model on the disk or the Hub, but without model.path "
            "the base has random weights that no file holds; set model.path, or peft.save=merged"
        )
    if model.dropout is not None and isinstance(config, PPOStageConfig):
        yield (
            f"model.dropout={model.dropout}: PPO uses no dropout, because its ratios compare two "
            "passes over the same tokens; set model.dropout=null, or set it in the SFT stage only"
        )


def _token_rules(model: ModelConfig) -> Iterator[str]:
    for name in ("special_tokens", "stop_strings"):
        texts = getattr(model, name) or []
        if not all(texts) or len(set(texts)) != len(texts):
            yield f"model.{name} must be distinct, non-empty texts, got {texts}"


def _reward_rules(config: RewardStageConfig) -> Iterator[str]:
    reward = config.reward
    if reward.loss == "plackett_luce" and reward.label_smoothing:
        yield f"reward.label_smoothing={reward.label_smoothing} needs reward.loss=pairwise, or 0"
    if config.batch_size is not None and reward.tokens_per_batch is not None:
        yield (
            f"batch_size={config.batch_size} counts prompts, but reward.tokens_per_batch="
            f"{reward.tokens_per_batch} puts as many as fit into a step; set one of them to null"
        )


def _scorer_rules(scorer: ScorerConfig) -> Iterator[str]:
    components, combine = scorer.components, scorer.combine
    weights = [component.weight for component in components]
    gates = [component.gate for component in components]
    names = [component.label for component in components]
    if str(scorer.path).endswith(".py"):
        module = Path(str(scorer.path)).stem
        yield f"scorer.path={scorer.path} is a file; name the function in it: {module}.<function>"
    if components and scorer.path is not None:
        yield f"give scorer.path={scorer.path} or scorer.components, not both"
    if combine != "weighted_sum" and len(components) < 2:
        yield f"scorer.combine={combine} needs two scorer.components or more, got {len(components)}"
    if 0 in weights:
        yield f"scorer.components: no weight may be 0, got {weights}"
    if combine != "weighted_sum" and any(weight != 1 for weight in weights):
        yield f"scorer.combine={combine} ignores weights, got {weights}; leave them at 1"
    if components and None not in gates:
        yield f"scorer.components need one without a gate, for responses that pass all, got {gates}"
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        yield f"scorer.components: set names, distinct and of letters, digits and _.-, got {names}"


def _critic_rules(config: PPOStageConfig) -> Iterator[str]:
    critic, ppo = config.critic, config.ppo
    if critic.init not in ("reward", "policy", None) and not Path(critic.init).is_dir():
        yield (
            "critic.init must be reward, policy, or the directory of a trained critic "
            f"(runs/<run_name>/ppo/critic), got {critic.init!r}"
        )
    first = config.scorer.components[0] if config.scorer.components else config.scorer
    if critic.init == "reward" and ppo.has_critic and not has_weights(first.path):
        yield (
            f"critic.init=reward needs a reward model, but scorer.path={first.path} is none; set "
            "critic.init=policy"
        )
    if critic.share_trunk and critic.init not in ("policy", None):
        yield (
            "critic.share_trunk=true puts the value head on the policy's own trunk, but "
            f"critic.init={critic.init} names another model; set critic.init=null, or "
            "critic.share_trunk=false"
        )
    if critic.share_trunk and not ppo.has_critic:
        yield "critic.share_trunk=true needs a critic (ppo.advantage=gae); set it to false"
    if critic.trunk_coef != 1 and not critic.share_trunk:
        yield (
            f"critic.trunk_coef={critic.trunk_coef} needs critic.share_trunk=true: a critic of its "
            "own has no gradient into the policy; set it to 1"
        )
    if critic.must_explain and not ppo.has_critic:
        yield "critic.must_explain=true needs a critic (ppo.advantage=gae); set it to null"
    if critic.warmup_updates and not ppo.has_critic:
        yield f"critic.warmup_updates={critic.warmup_updates} needs a critic (ppo.advantage=gae)"


def has_frozen_models(config: PPOStageConfig) -> bool:
    """True if PPO has a reference or a reward model of its own, which it does not train."""
    scorer = config.scorer
    paths = [part.path for part in scorer.components] or [scorer.path]
    paths += [path for path in [config.evaluation.scorer] if path is not None]
    has_reference = config.ppo.reference is not None or not config.peft.enabled
    return has_reference or any(map(has_weights, paths))


def _frozen_rules(config: PPOStageConfig) -> Iterator[str]:
    if config.offload_frozen and not has_frozen_models(config):
        yield (
            "offload_frozen=true has nothing to move: with adapters, the reference is the policy "
            "with its adapters off, and the scorer is no reward model; set it to false"
        )


def _base_rules(config: PPOStageConfig) -> Iterator[str]:
    reference, label = config.ppo.reference, "ppo.share_base=true"
    if not config.ppo.share_base:
        if config.ppo.base == "stacked":
            yield "ppo.base=stacked says what one base for all roles holds; set ppo.share_base=true"
        return
    if not config.peft.enabled:
        yield f"{label} trains adapters on a frozen base, not all weights; set peft=lora"
    if reference is not None:
        yield (
            f"{label} makes the base without adapters the reference, but ppo.reference={reference} "
            "is another model; set ppo.reference=null, or ppo.share_base=false"
        )
    if config.critic.share_trunk:
        yield (
            f"{label} gives the critic an adapter of its own, but critic.share_trunk=true only a "
            "head; set one of them to false"
        )
    if config.offload_frozen:
        yield (
            f"{label} has no frozen model of its own that could leave the GPU; set "
            "offload_frozen=false"
        )


def _rollout_rules(ppo: PPOConfig) -> Iterator[str]:
    size, penalty = ppo.batch_size, ppo.missing_eos_penalty
    if isinstance(penalty, str) and penalty != "auto":
        yield f"ppo.missing_eos_penalty must be a number, null or auto, got {penalty!r}"
    tokens, least = ppo.micro_batch_tokens, ppo.response_length + 1
    if isinstance(tokens, str) and tokens != "auto":
        yield f"ppo.micro_batch_tokens must be a number, auto or null, got {tokens!r}"
    if isinstance(tokens, int) and tokens < least:
        yield (
            f"ppo.micro_batch_tokens={tokens} is less than a row: ppo.response_length="
            f"{ppo.response_length} and a prompt; set it to {least} or more"
        )
    for name in ("num_mini_batches", "samples_per_prompt"):
        number = getattr(ppo, name)
        if number >= 1 and size % number:
            yield f"ppo.batch_size must be divisible by ppo.{name}, got {size} and {number}"
    compares = ppo.advantage in ("rloo", "grpo")
    if compares and ppo.samples_per_prompt == 1:
        yield f"ppo.advantage={ppo.advantage} needs ppo.samples_per_prompt >= 2, e.g. 4, got 1"
    if not ppo.allow_off_policy_sampling and (ppo.top_p != 1.0 or ppo.top_k != 0):
        yield (
            f"ppo.top_p={ppo.top_p} and ppo.top_k={ppo.top_k} sample from a different distribution "
            "than the one PPO scores; leave them at 1.0 and 0, or set "
            "ppo.allow_off_policy_sampling=true"
        )
    if ppo.scale_scores and ppo.whiten_scores:
        yield "ppo.scale_scores and ppo.whiten_scores both scale the scores; set one to false"
    if ppo.mask_truncated and ppo.whiten_rewards and compares:
        yield (
            "ppo.mask_truncated=true and ppo.whiten_rewards=true give truncated responses no "
            f"rewards, but ppo.advantage={ppo.advantage} compares other responses with them; set "
            "ppo.whiten_rewards=false"
        )


def _sampling_rules(sampling: SamplingConfig, ppo: PPOConfig, peft: PeftConfig) -> Iterator[str]:
    url, python = sampling.url, sampling.vllm_python
    if sampling.gather == "layers" and (sampling.engine in ("graph", "vllm") or sampling.dtype):
        yield (
            "sampling.gather=layers needs sampling.engine=loop and sampling.dtype=null, got "
            f"{sampling.engine} and {sampling.dtype or 'null'}; or set sampling.gather=auto"
        )
    if sampling.engine != "vllm":
        for name in ("url", "vllm_python", "vllm_args", "weights", "weights_dir"):
            if (value := getattr(sampling, name)) not in (None, [], "auto"):
                yield (
                    f"sampling.{name}={show(value)} is for sampling.engine=vllm, but "
                    f"sampling.engine={sampling.engine}; set sampling.engine=vllm, or leave "
                    f"sampling.{name} out"
                )
        return
    if url is None and python is None:
        yield (
            "sampling.engine=vllm needs a server: give sampling.url=http://127.0.0.1:8000 of one "
            "that runs, or sampling.vllm_python=<python of an environment with vLLM> to start one"
        )
    if url is not None and python is not None:
        yield f"give sampling.url={url} or sampling.vllm_python={python}, not both"
    if sampling.vllm_args and python is None:
        yield "sampling.vllm_args are for a server that the run starts: give sampling.vllm_python"
    if sampling.weights == "adapter" and not peft.enabled:
        yield (
            "sampling.weights=adapter sends LoRA adapters, and all weights train; train with "
            "peft=lora, or set sampling.weights=files"
        )
    if ppo.temperature > 2:
        yield f"sampling.engine=vllm: ppo.temperature is at most 2 in vLLM, got {ppo.temperature}"
    if ppo.top_p != 1.0 or ppo.top_k != 0:
        yield (
            f"sampling.engine=vllm: ppo.top_p={ppo.top_p} and ppo.top_k={ppo.top_k} also change "
            "the log-probs that vLLM gives; leave them at 1.0 and 0, or take sampling.engine=auto"
        )


def _update_rules(ppo: PPOConfig) -> Iterator[str]:
    betas = ppo.adam_betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"ppo.adam_betas must be two numbers in [0, 1), e.g. [0.9, 0.95], got {betas}"
    if ppo.target_kl is not None and ppo.num_ppo_epochs * ppo.num_mini_batches == 1:
        yield f"ppo.target_kl={ppo.target_kl} has no step to skip in updates of one; set it to null"
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield "ppo.kl_in=loss needs ppo.kl_estimator=k3 or k2: k1 has an expected gradient of 0"
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        yield f"ppo.kl_target={ppo.kl_target} multiplies ppo.kl_coef, which is 0; set it above 0"
