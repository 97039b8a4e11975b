"""The actors of a PPO run: policy, reference, critic and scorers, loaded and checked.

`stage.py` calls this first; `prompts.py` comes after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from rlhf.checkpoint import StageRecord, require_same_tokenizer, require_stage, warn_about_sft_model
from rlhf.config import InputError, ModelConfig, PPOStageConfig
from rlhf.console import say, warn
from rlhf.distributed import (
    describe_sharding,
    is_sharded,
    loads_in_slices,
    move,
    offloads,
    zero_stage,
)
from rlhf.equivalence import (
    choose_forward,
    compile_if_same,
    require_cache,
    require_padding,
    store_as_read,
)
from rlhf.models import (
    SharedTrunk,
    ValueHead,
    add_lora,
    choose_chunk_tokens,
    disable_dropout,
    load_reference,
    new_token_rows,
    own_parameters,
    parameter_count,
    sample_as_trained,
    shard,
    shard_base,
    slices_of,
    try_settings,
)
from rlhf.ppo.critic import (
    critic_source,
    first_scorer,
    is_on_stacked_base,
    load_base,
    load_critic,
    load_on_base,
    needs_reward_model,
)
from rlhf.scorers import Scorer, load_scorer, reward_models
from rlhf.tokenizer import hash_rendering, hash_tokenizer, load_tokenizer
from rlhf.zero import make_runnable


@dataclass
class Actors:
    """The models of PPO.

    Attributes:
        policy: unwrapped causal LM, PEFT allowed.
        reference: frozen causal LM; None if the policy with its adapters off is the reference.
        critic: `ScalarModel`; with `critic.share_trunk` a `ValueHead` on the policy's trunk; None
            for estimators without one.
        tokenizer: of the policy.
        tokenizer_hash: `hash_rendering` of the tokenizer; a reward model with the same hash scores
            the token ids directly.
        sampling: what samples from the policy, in words.
        frozen: how the models that do not train are stored, in words.
        other_forwards: which models read rows otherwise than the policy, and how, in words.
        reading_device: with `offload_frozen`: where whole models are inside `in_use`; elsewhere
            they are on the CPU. None: they stay where they are.
        shared_base: which models are adapters on the policy's base, in words; "" without
            `ppo.share_base`.
        compiled: which models run compiled blocks, in words.
        score_group: number of responses that are scored at once while others are sampled; 0: all
            are scored after sampling.
    """

    policy: Any
    reference: Any
    critic: Any
    scorer: Scorer
    tokenizer: Any
    tokenizer_hash: str
    sampling: str = "loop"
    frozen: str = ""
    other_forwards: str = ""
    reading_device: Any = None
    shared_base: str = ""
    compiled: str = ""
    score_group: int = 0

    @property
    def shares_trunk(self) -> bool:
        return isinstance(self.critic, ValueHead)

    @property
    def reader(self) -> Any:
        """The policy, with the value head if that is on its trunk."""
        return SharedTrunk(self.policy, self.critic) if self.shares_trunk else self.policy

    def describe_sharding(self, accelerator: Accelerator) -> str | None:
        """How the processes share weights, in words; None if each has all of them."""
        if self.shared_base:
            return describe_sharding(accelerator, "the base", "; adapters and heads whole on each")
        return describe_sharding(accelerator)

    @contextmanager
    def in_use(self, *models: Any) -> Iterator[None]:
        """Have models on the GPU inside the block, if they wait on the CPU."""
        moved = [m for m in models if self.reading_device is not None and not is_sharded(m)]
        try:
            for model in moved:
                model.to(self.reading_device)
            yield
        finally:
            for model in moved:
                model.to("cpu")


def load_checked_tokenizer(config: PPOStageConfig) -> tuple[Any, StageRecord | None]:
    """Load the policy's tokenizer and the record of its stage, if it has one; check that they fit
    the reward model."""
    policy = str(config.model.path)
    record = require_stage(policy, ("sft", "ppo"), "model.path", config.model.revision)
    tokenizer = load_tokenizer(config.model)
    require_same_tokenizer(tokenizer, record, "the model settings here", policy)
    _check_reference(config, tokenizer)
    if needs_reward_model(config):
        scorer = str(first_scorer(config)[0].path)
        reward_record = require_stage(scorer, ("reward",), "scorer.path")
        require_same_tokenizer(tokenizer, reward_record, policy, scorer)
    return tokenizer, record


def _check_reference(config: PPOStageConfig, tokenizer: Any) -> None:
    """Require that `ppo.reference` reads token ids as the policy does."""
    reference = config.ppo.reference
    if reference is None:
        return
    record = require_stage(reference, ("sft", "ppo"), "ppo.reference")
    theirs = record.tokenizer if record else hash_tokenizer(load_tokenizer(_reference(config)))
    if theirs != hash_tokenizer(tokenizer):
        raise InputError(
            f"ppo.reference={reference} has another tokenizer (vocabulary or special tokens) than "
            f"model.path={config.model.path}, so its log-probs are those of other texts; give a "
            "model with the same tokenizer, or ppo.reference=null"
        )


def _reference(config: PPOStageConfig) -> ModelConfig:
    return replace(config.model, path=config.ppo.reference, tokenizer=None, revision=None)


def try_adapters(config: PPOStageConfig) -> None:
    """Try the adapters on policy and critic before any weights load."""
    try_settings(config.model, config.peft)
    if config.ppo.has_critic and not config.critic.share_trunk:
        source, field = critic_source(config)
        try_settings(source, config.peft, "SEQ_CLS", field)


def load_actors(
    config: PPOStageConfig, tokenizer: Any, scorer: Scorer | None, accelerator: Accelerator
) -> Actors:
    """Load policy, reference, critic and scorer, without dropout, on this process's device. Where
    the launcher shards, the first three are in slices."""
    device, ppo = accelerator.device, config.ppo
    rows = new_token_rows(tokenizer, config.model, config.peft) if config.peft.enabled else []
    policy, reference = load_base(config, tokenizer), None
    base = _place_base(policy, accelerator, rows) if ppo.share_base else None
    if scorer is None:
        code = config.model.trust_remote_code
        load = None if base is None else partial(load_on_base, config, base)
        scorer = load_scorer(config.scorer, device, trust_remote_code=code, load=load)
    if needs_reward_model(config) and reward_models(scorer)[0].scores_texts:
        raise InputError(
            f"critic.init=reward: the reward model {reward_models(scorer)[0].path} scores a text "
            "as a whole and has no value for each token; set critic.init=policy"
        )
    rendering = hash_rendering(tokenizer)
    _show_reward_models(config, scorer, rendering)
    for line in sample_as_trained(policy, ppo.temperature, ppo.top_p, ppo.top_k):
        say(line)
    critic: Any = None
    shares = config.critic.share_trunk
    if ppo.has_critic and not shares:
        critic = load_critic(config, tokenizer, base)
    if config.peft.enabled:
        policy = add_lora(policy, config.peft, "CAUSAL_LM", config.seed, rows)
        if critic is not None and isinstance(critic.model, PreTrainedModel):  # without an adapter
            critic.model = add_lora(critic.model, config.peft, "SEQ_CLS", config.seed, rows)
    if shares:
        critic = ValueHead(policy, config.critic.trunk_coef)
    if ppo.reference is not None:
        reference = load_reference(_reference(config), tokenizer, "ppo.reference", in_slices=True)
    elif not config.peft.enabled:
        reference = load_reference(config.model, tokenizer, in_slices=True)
    for model in (policy, critic, reference):
        if model is not None:
            disable_dropout(model)
            _place(model, accelerator, config.offload_frozen and model is reference)
    for model in (policy, reference):
        if model is not None:
            choose_chunk_tokens(model, config.ppo.chunk_tokens)
    actors = Actors(policy, reference, critic, scorer, tokenizer, rendering)
    if base is not None:
        actors.shared_base = describe_base(actors)
        if ppo.base == "stacked":
            actors.shared_base += f"; the adapter of {config.model.path} stays apart from the base"
    return actors


def _place_base(policy: Any, accelerator: Accelerator, rows: Sequence[int]) -> Any:
    """As `_place`, for a policy without adapters that becomes the base of all roles; return it.

    Args:
        rows: of the embedding tables, which will train.
    """
    if loads_in_slices():
        shard_base(policy, whole_tables=bool(rows))
    else:
        policy.to(accelerator.device)
    return policy


def _place(model: Any, accelerator: Accelerator, waits: bool) -> None:
    """Put a model on this process's device, or there in slices, in place; slices of one that
    `waits` are in main memory."""
    if loads_in_slices() and slices_of(model) is None:
        shard(model, on_cpu=waits and accelerator.device.type != "cpu")
        if zero_stage() == 3:
            make_runnable(model, offloads())
    else:
        move(model, accelerator.device)


def describe_base(actors: Actors) -> str:
    """Say which models are adapters on the policy's base, and how large base and adapters are."""
    scorers = [model.model for model in reward_models(actors.scorer)]
    names, own = ["policy", "reference"], 0
    for name, model in (("critic", actors.critic), *(("reward model", m) for m in scorers)):
        parameters = {} if model is None else own_parameters(model, actors.policy)
        if model is not None and len(parameters) < len(list(model.parameters())):
            names.append(name)
            own += sum(parameter.numel() for parameter in parameters.values())
    total, trained = parameter_count(actors.policy)
    return (
        f"{total - trained:,} frozen parameters in memory once, for {', '.join(names)}; the "
        f"adapters and heads on them have {trained + own:,}"
    )


def check_promises(config: PPOStageConfig, actors: Actors, accelerator: Accelerator) -> str:
    """Require that the cache gives the policy's own logits, and that no model reads padding; the
    scorer was examined when it was loaded. Choose how each model reads rows; return that of the
    policy, and set `actors.other_forwards`."""
    where, fix = f"model.path={config.model.path}", "take a model of another family"
    own = {where: actors.policy, "the reference": actors.reference}
    if not actors.shares_trunk:
        own[f"critic.init={config.critic.init}"] = actors.critic
    forwards: dict[str, str] = {}
    tokenizer = actors.tokenizer
    with accelerator.autocast():
        for name, model in own.items():
            if model is None:
                continue
            with actors.in_use(model):
                if model is actors.policy:
                    require_cache(model, tokenizer, name, fix)
                if model is not actors.reference:
                    require_padding(model, tokenizer, name, fix)
                forwards[name] = choose_forward(model, tokenizer, config.model.forward)
        for scorer in reward_models(actors.scorer):  # they chose for themselves when loaded
            if config.model.forward == "padded":
                scorer.forward = choose_forward(scorer.model, scorer.tokenizer, "padded")
            forwards[scorer.path] = scorer.forward
    others = {name: forward for name, forward in forwards.items() if forward != forwards[where]}
    actors.other_forwards = "; ".join(f"{name} is {forward}" for name, forward in others.items())
    return forwards[where]


def settle_frozen(
    config: PPOStageConfig, actors: Actors, scorers: Sequence[Scorer], accelerator: Accelerator
) -> str:
    """Store the models that do not train in the type in which they are read, and move them to the
    CPU with `offload_frozen`; return that in words, or "" where nothing is special.

    Args:
        scorers: those that this run has loaded; the caller's own stay as they are.
    """
    models, types = [], []
    if actors.reference is not None and is_sharded(actors.reference):
        types.append("reference in slices")
    elif actors.reference is not None:
        models.append(("reference", actors.reference, actors.tokenizer))
    models += [(m.path, m.model, m.tokenizer) for s in scorers for m in reward_models(s)]
    with accelerator.autocast():
        types += [f"{name} {store_as_read(model, own)}" for name, model, own in models]
    if types and accelerator.mixed_precision == "bf16":
        actors.frozen = ", ".join(types)
    if not config.offload_frozen:
        return actors.frozen
    where = "not offloaded: all models are on the CPU"
    if accelerator.device.type != "cpu":
        where, actors.reading_device = "on the CPU, except while they are read", accelerator.device
        for model in [m for _, m, _ in models] + [m.model for m in reward_models(actors.scorer)]:
            model.to("cpu")
    actors.frozen = "; ".join(filter(None, (actors.frozen, where)))
    return actors.frozen


def compile_actors(actors: Actors, accelerator: Accelerator) -> str:
    """Compile the decoder blocks of policy, reference and critic; return what came of it, with the
    seconds that it took."""
    began = time.perf_counter()
    models = {"policy": actors.policy, "reference": actors.reference}
    models |= {"critic": None if actors.shares_trunk else actors.critic}
    with accelerator.autocast():
        found = [
            f"{name} {compile_if_same(model, actors.tokenizer)}"
            for name, model in models.items()
            if model is not None
        ]
    actors.compiled = ", ".join(found)
    return f"{actors.compiled} (warm-up: {time.perf_counter() - began:.0f} s)"


def _show_reward_models(config: PPOStageConfig, scorer: Scorer, rendering: str) -> None:
    """Say what each reward model's report says, and how it differs from the policy."""
    for reward_model in reward_models(scorer):
        _show_report(reward_model.path)
        if not is_on_stacked_base(config, reward_model.path):
            warn_about_sft_model(reward_model.path, str(config.model.path))
        if reward_model.tokenizer_hash != rendering:
            say(
                f"{reward_model.path} has another tokenizer or chat template than the policy: it "
                "scores the text of the responses, which its own tokenizer and template encode"
            )


def _show_report(path: str) -> None:
    """Say the summary and the warnings of the reward model's report, if there is one."""
    file = Path(path) / "report.json"
    if not file.is_file():
        return
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        summary, warnings = report["summary"], report["warnings"]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({error!r}); make it again: python -m rlhf.reward.report "
            f"path={path}"
        ) from error
    say(f"reward model {path}: {summary}")
    for warning in warnings:
        warn(warning)
