"""The PPO stage: check and load everything, look before training, run."""

from __future__ import annotations

from rlhf.checkpoint import StageRun, open_run, require_writable, warn_about_prompts
from rlhf.config import PPOStageConfig
from rlhf.console import say
from rlhf.data import load_splits
from rlhf.distributed import make_accelerator
from rlhf.models import unwrap_peft
from rlhf.ppo.actors import (
    check_batches,
    check_promises,
    collect_settings,
    describe_batches,
    load_actors,
    load_checked_tokenizer,
    load_independent_scorer,
    load_texts,
    try_adapters,
    with_sources,
)
from rlhf.ppo.evaluation import Evaluator
from rlhf.ppo.loop import PPOResult, Run
from rlhf.ppo.preflight import run_preflight
from rlhf.ppo.prompts import choose_prompts
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import context_length
from rlhf.scorers import Scorer


def train_ppo(config: PPOStageConfig, scorer: Scorer | None = None) -> PPOResult:
    """Train a policy with PPO against a scorer.

    Args:
        config: see `conf/ppo.yaml` for every knob; `model.path` and `scorer.path` default to this
            run's SFT and reward directories.
        scorer: see `rlhf.scorers`, in place of `config.scorer`; needs `critic.init=policy`.

    Returns:
        With `preflight=only`, an empty result: nothing is trained or written.

    Raises:
        InputError: bad configuration, directory or data, a check of the preflight failed, or
            another process writes to the stage's directory; nothing has been trained or overwritten
            then.
    """
    config = with_sources(config, scorer)
    with open_run(config, "ppo", writes=config.preflight != "only") as run:
        if run.finished is not None:
            metrics = dict(run.finished.metrics)
            update = int(metrics.pop("update"))
            return PPOResult(run.directory / "final", {}, metrics, update)
        return _train(config, scorer, run)


def _train(config: PPOStageConfig, scorer: Scorer | None, run: StageRun) -> PPOResult:
    """As `train_ppo`, for a run that is not finished."""
    tokenizer, parent = load_checked_tokenizer(config)
    try_adapters(config)
    accelerator = make_accelerator(config.precision)
    num_processes = accelerator.num_processes
    check_batches(config, num_processes)
    independent = load_independent_scorer(config, accelerator.device)
    evaluates = config.evaluation.num_prompts > 0
    splits = load_splits(config.dataset, "ppo", config.seed, needs_eval=evaluates)
    warn_about_prompts(parent, splits.prompts)
    actors = load_actors(config, tokenizer, scorer, accelerator)
    require_writable(unwrap_peft(actors.policy), tokenizer, config)
    check_promises(config, actors, accelerator)
    settings = collect_settings(config, actors.policy, tokenizer)
    texts = load_texts(config, tokenizer, context_length(actors.policy))
    prompts, heldout, too_long = choose_prompts(config, splits, actors, independent, num_processes)
    say(describe_batches(config, len(prompts), num_processes, actors))
    say(splits.describe(too_long))
    splits.dropped += too_long
    trainer = PPOTrainer(config, actors, prompts, settings, accelerator, run.directory, texts)
    if config.preflight:
        run_preflight(trainer, heldout, independent)
    if config.preflight == "only":
        return PPOResult(None, {}, {})
    run.begin()
    return Run(config, trainer, Evaluator(trainer, heldout, independent), splits).run()
