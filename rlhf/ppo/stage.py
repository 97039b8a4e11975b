"""The PPO stage: refuse early, load, look, train.

`python -m rlhf.ppo` and `train_ppo` start here. `actors.py` loads the models, `prompts.py` chooses
the prompts. Read on in `trainer.py` (one update: `rollout.py`, then `update.py`) and `loop.py`
(updates, evaluations and checkpoints until the end).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rlhf.checkpoint import StageRun, open_run, require_writable, warn_about_prompts
from rlhf.config import (
    InputError,
    PPOStageConfig,
    ScorerConfig,
    has_weights,
    is_python,
    with_default_paths,
    with_learning_rates,
)
from rlhf.console import say
from rlhf.data import describe_dropped, encode_texts, first_cases, load_rows, load_splits, with_rows
from rlhf.distributed import make_accelerator
from rlhf.failures import same_rows
from rlhf.models import parameter_count, unwrap_peft, why_not_compiled
from rlhf.ppo.actors import (
    Actors,
    check_promises,
    compile_actors,
    load_actors,
    load_checked_tokenizer,
    settle_frozen,
    try_adapters,
)
from rlhf.ppo.critic import first_scorer, needs_reward_model, require_same_base
from rlhf.ppo.evaluation import Evaluator
from rlhf.ppo.loop import PPOLoop
from rlhf.ppo.other_scorers import load_independent_scorer, require_scorer_columns
from rlhf.ppo.preflight import run_preflight
from rlhf.ppo.prompts import choose_prompts, refuse_long_rows, require_room_for_rows
from rlhf.ppo.result import PPOResult, finished_result
from rlhf.ppo.sampler import choose_sampler, sampling_server
from rlhf.ppo.scoring import choose_scoring
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import context_length
from rlhf.scorers import Scorer, instance, reward_models
from rlhf.sharding_settings import mixes_types, refuse_under_deepspeed, refuse_under_sharding


def train_ppo(
    config: PPOStageConfig,
    scorer: Scorer | None = None,
    rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
) -> PPOResult:
    """Train a policy with PPO against a scorer.

    Args:
        config: see `conf/ppo.yaml` for every knob; `model.path` and `scorer.path` default to this
            run's SFT and reward directories.
        scorer: replaces `config.scorer`, see `rlhf.scorers`.
        rows: a list, `datasets.Dataset` or generator of rows, in place of `dataset.path`.
        eval_rows: the same, in place of `dataset.eval_path`.

    Returns:
        With `preflight=only`, an empty result: nothing is trained or written.

    Raises:
        InputError: bad configuration, directory or data, a failed preflight, or another process
            that writes to the same directory. Nothing is then trained or overwritten.
    """
    scorer = None if scorer is None else instance(scorer)
    config = with_sources(with_rows(config, rows, eval_rows), scorer)
    with open_run(config, "ppo", writes=config.preflight != "only") as run:
        if run.finished is not None:
            return finished_result(config, run.finished.metrics, run.directory)
        with sampling_server(config) as server:
            return _train(config, scorer, run, server)


def _train(config: PPOStageConfig, scorer: Scorer | None, run: StageRun, server: Any) -> PPOResult:
    # Refuse early: tokenizers, adapters, batch sizes, the second scorer and the data take seconds.
    refuse_here(config)
    tokenizer, parent = load_checked_tokenizer(config)
    require_same_base(config)
    try_adapters(config)
    accelerator = make_accelerator(config.precision)
    num_processes = accelerator.num_processes
    require_equal_shares(config, num_processes)
    independent = load_independent_scorer(config, accelerator.device)
    before = getattr(parent, "prompts", None)
    splits = same_rows(load_splits(config.dataset, "ppo", config.seed, config.needs_eval, before))
    warn_about_prompts(parent, splits.prompts)
    require_scorer_columns(config, scorer, splits)
    refuse_long_rows(config, tokenizer, splits)

    # Load: the models, then the prompts and texts that fit into their contexts.
    actors = load_actors(config, tokenizer, scorer, accelerator)
    require_writable(unwrap_peft(actors.policy), tokenizer, config)
    forward = check_promises(config, actors, accelerator)
    own = None if scorer is not None or config.ppo.share_base else actors.scorer
    loaded = [s for s in (own, independent) if s is not None]
    frozen = settle_frozen(config, actors, loaded, accelerator)
    texts = load_texts(config, tokenizer, context_length(actors.policy))
    prompts, heldout, too_long = choose_prompts(config, splits, actors, independent)
    require_room_for_rows(config.ppo, max(len(prompt["input_ids"]) for prompt in prompts))
    say(describe_batches(config, len(prompts), num_processes, actors))
    compiled = compile_actors(actors, accelerator) if config.compile else ""
    trainer = PPOTrainer(config, actors, prompts, accelerator, run.directory, texts)
    choose_sampler(trainer, independent, server)
    scoring, shards = choose_scoring(config, actors), actors.describe_sharding(accelerator)
    chosen: dict[str, str | None] = {"one base": actors.shared_base}
    chosen |= {"forward": "; ".join(filter(None, (forward, actors.other_forwards)))}
    chosen |= {"sampling": actors.sampling}
    chosen |= {"scoring": scoring, "sharding": shards}
    chosen |= {"frozen models": frozen, "compile": compiled}
    say("\n".join(f"     {name}: {text}" for name, text in chosen.items() if text))
    say(splits.describe(too_long))
    splits.dropped += too_long

    # Look: the preflight measures on the loaded models whether the run can succeed.
    if config.preflight:
        run_preflight(trainer, heldout, independent)
    if config.preflight == "only":
        return PPOResult(None, {})

    # Train: only now is anything written to the stage's directory.
    run.begin(splits.train, splits.eval)
    return PPOLoop(config, trainer, Evaluator(trainer, heldout, independent), splits).run()


def refuse_here(config: PPOStageConfig) -> None:
    """Refuse settings that this machine, or its launcher, cannot have."""
    if config.compile and (reason := why_not_compiled()):
        raise InputError(f"compile=true: {reason}; install one, or set compile=false")
    refuse_under_sharding(
        {
            "compile=true": config.compile,
            "critic.share_trunk=true": config.critic.share_trunk,
            f"model.quantization={config.model.quantization}": config.model.quantization,
            f"model.dtype={config.model.dtype}": mixes_types(config, config.ppo.has_critic),
        }
    )
    refuse_under_deepspeed(config)


def with_sources(config: PPOStageConfig, scorer: Scorer | None) -> PPOStageConfig:
    """Return a copy that names the stages that PPO starts from, the scorer that the caller passed,
    and what follows from the scorer."""
    config = with_learning_rates(with_default_paths(config), say)
    if scorer is not None:
        if needs_reward_model(config):
            raise InputError(
                "critic.init=reward needs a reward model; with your own scorer set "
                "critic.init=policy"
            )
        name = getattr(scorer, "__qualname__", type(scorer).__qualname__)
        config.scorer = ScorerConfig(f"python:{scorer.__module__}.{name}", normalize="none")
        if reward_models(scorer) and config.ppo.missing_eos_penalty == "auto":
            config.ppo.missing_eos_penalty = -1.0
    config.ppo.missing_eos_penalty = config.eos_penalty
    if config.critic.init is None:
        path, shares = first_scorer(config)[0].path, config.critic.share_trunk
        own = not has_weights(path)
        config.critic.init = "policy" if own or shares else "reward"
        if own and config.ppo.has_critic and not shares:
            kind = "a Python function" if is_python(path) else "no reward model"
            say(f"critic.init=policy: the scorer is {kind}")
    return config


def load_texts(config: PPOStageConfig, tokenizer: Any, context: int) -> list[list[int]]:
    """Token ids of the PPO-ptx texts; none if `ptx.coef` is 0."""
    ptx = config.ptx
    if not ptx.coef:
        return []
    if ptx.max_length > context:
        raise InputError(
            f"ptx.max_length={ptx.max_length} exceeds the model's context of {context} tokens; "
            "lower it"
        )
    bad = config.dataset.on_bad_row
    rows, dropped = load_rows(str(ptx.path), ptx.format, ptx.split, "ptx", "ptx.path", bad)
    texts, unusable = encode_texts(rows, tokenizer, ptx.max_length, bad)
    dropped += unusable
    say("\n".join([f"ptx: {len(texts)} texts; {describe_dropped(dropped)}", *first_cases(dropped)]))
    return texts


def require_equal_shares(config: PPOStageConfig, num_processes: int) -> None:
    """Require the same share of each minibatch, and of the ptx texts, for every process."""
    per_minibatch = config.ppo.batch_size // config.ppo.num_mini_batches
    if per_minibatch % num_processes:
        raise InputError(
            f"ppo.batch_size / ppo.num_mini_batches = {per_minibatch} must be divisible by the "
            f"{num_processes} processes; start a number of them that divides it, or in a new run "
            "change ppo.batch_size"
        )
    if config.ptx.coef and config.ptx.batch_size % num_processes:
        raise InputError(
            f"ptx.batch_size={config.ptx.batch_size} must be divisible by the {num_processes} "
            "processes; change it"
        )


def describe_batches(
    config: PPOStageConfig, num_prompts: int, num_processes: int, actors: Actors
) -> str:
    """Spell out what follows from the batch sizes."""
    ppo = config.ppo
    minibatch = ppo.batch_size // ppo.num_mini_batches
    most, rows = ppo.micro_batch_tokens, ppo.rows_of(1)
    if isinstance(most, int):
        limit = f", passes of at most {most} tokens"
    elif most == "auto":
        limit = ", passes of as many tokens as the preflight finds room for"
    elif ppo.micro_batch_size is None:
        limit = f", passes with at most the tokens of the {rows} longest sequences"
    else:
        number = math.ceil(minibatch // num_processes / rows)
        limit = f" x {number} micro-batches of at most {rows}"
    total, trainable = parameter_count(actors.policy)
    own = "adapters off" if actors.reference is None else "own copy"
    reference = ppo.reference or own
    critic = f"no critic ({ppo.advantage})"
    if actors.critic is not None:
        start = f"critic from {config.critic.init}"
        if actors.shares_trunk:
            start = "values from a head on the policy's trunk (no critic/)"
        critic = f"{start}, {parameter_count(actors.critic)[1]:,} trainable"
    steps = ppo.num_ppo_epochs * ppo.num_mini_batches
    prompts = ppo.batch_size // ppo.samples_per_prompt
    each = f" x {ppo.samples_per_prompt} responses" if ppo.samples_per_prompt > 1 else ""
    passes = ppo.num_updates * prompts / num_prompts
    which = f"{prompts} of {num_prompts} prompts"
    if prompts > num_prompts:
        which = f"{num_prompts} prompts, {prompts / num_prompts:.1f} times each"
    processes = f"{num_processes} process{'es' * (num_processes > 1)}"
    old = "; the first epoch gives the old log-probs" if ppo.first_epoch_reads else ""
    old = "" if actors.shares_trunk else old
    return (
        f"ppo: policy {total:,} parameters, {trainable:,} trainable (reference: {reference}); "
        f"{critic}\n"
        f"     rollout: {which}{each}, at most {ppo.response_length} "
        f"tokens each; {ppo.num_updates} updates = {ppo.num_updates * ppo.batch_size} episodes = "
        f"{passes:.1f} passes over the prompts\n"
        f"     update: {ppo.num_ppo_epochs} epochs x {ppo.num_mini_batches} minibatches of "
        f"{minibatch} = {steps} optimiser steps; {processes}{limit}{old}"
    )
