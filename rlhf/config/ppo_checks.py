"""Rules between the knobs of the PPO stage, and of a scorer: each yields a message where broken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.errors import show
from rlhf.config.knobs import PeftConfig, PPOConfig, PPOStageConfig, SamplingConfig, ScorerConfig
from rlhf.config.objects import has_weights


def ppo_rules(config: PPOStageConfig) -> Iterator[str]:
    """Yield what is wrong between the values of a PPO stage that no other stage has."""
    yield from scorer_rules(config.scorer)
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


def scorer_rules(scorer: ScorerConfig) -> Iterator[str]:
    """Yield what is wrong between the values of a scorer."""
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
    if sampling.gather == "layers" and sampling.engine in ("graph", "vllm"):
        yield (
            f"sampling.gather=layers needs sampling.engine=loop, got {sampling.engine}; or set "
            "sampling.gather=auto"
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
