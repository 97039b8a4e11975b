"""The PPO stage: check and load everything, look before training, run."""

from __future__ import annotations

from contextlib import nullcontext

from rlhf.checkpoint import (
    check_run_directory,
    check_writable,
    finished_run,
    one_writer,
    prepare_run_directory,
    warn_about_prompts,
)
from rlhf.config import PPOStageConfig, check
from rlhf.console import quiet_libraries, say
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
    with_default_paths,
)
from rlhf.ppo.evaluation import Evaluator
from rlhf.ppo.loop import PPOResult, Run
from rlhf.ppo.preflight.preflight import run_preflight
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
    config = with_default_paths(config, scorer)
    check(config)
    with nullcontext() if config.preflight == "only" else one_writer(config, "ppo"):
        return _train_alone(config, scorer)


def _train_alone(config: PPOStageConfig, scorer: Scorer | None) -> PPOResult:
    """As `train_ppo`, with the stage's directory locked."""
    quiet_libraries()
    only_look = config.preflight == "only"
    if not only_look:
        done = finished_run(config, "ppo")
        if done is not None:
            update = int(done.metrics.pop("update"))
            return PPOResult(config.stage_dir("ppo") / "final", {}, done.metrics, update)
        check_run_directory(config, "ppo")
    tokenizer, parent = load_checked_tokenizer(config)
    accelerator = make_accelerator(config.precision)
    num_processes = accelerator.num_processes
    check_batches(config, num_processes)
    independent = load_independent_scorer(config, accelerator.device)
    evaluates = config.evaluation.num_prompts > 0
    splits = load_splits(config.dataset, "ppo", config.seed, needs_eval=evaluates)
    warn_about_prompts(parent, splits.prompts)
    actors = load_actors(config, tokenizer, scorer, accelerator)
    check_writable(unwrap_peft(actors.policy), tokenizer, config)
    check_promises(config, actors, accelerator)
    settings = collect_settings(config, actors.policy, tokenizer)
    texts = load_texts(config, tokenizer, context_length(actors.policy))
    prompts, heldout, too_long = choose_prompts(config, splits, actors, independent, num_processes)
    say(describe_batches(config, len(prompts), num_processes, actors))
    say(splits.describe(too_long))
    splits.dropped += too_long
    directory = config.stage_dir("ppo")
    trainer = PPOTrainer(config, actors, prompts, settings, accelerator, directory, texts)
    if config.preflight:
        run_preflight(trainer, heldout, independent)
    if only_look:
        return PPOResult(None, {}, {})
    prepare_run_directory(config, "ppo")
    return Run(config, trainer, Evaluator(trainer, heldout, independent), splits).run()
