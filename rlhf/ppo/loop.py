"""The loop of the PPO stage: updates, evaluations, checkpoints, interruption, `final/`.

`stage.py` comes before: it builds the trainer and starts this loop. Each turn calls
`PPOTrainer.step`, then `watchdog.py`, and when due `evaluation.py`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from rlhf.checkpoint import (
    GracefulStop,
    NonFiniteError,
    StageRecord,
    checkpoint_to_resume,
    copy_to_all_hosts,
    describe_saved,
    explain_stop,
    make_record,
    parent_weights,
    read_settings,
    refuse_taken_steps,
    run_id,
    write_stage,
)
from rlhf.checkpoint.saving import CheckpointWriter
from rlhf.checkpoint.state import load_modules, load_training_state, random_state
from rlhf.config import InputError, PPOStageConfig, resume_overrides
from rlhf.console import progress_bar, say, warn
from rlhf.curves import write_curves
from rlhf.data import Splits
from rlhf.failures import phase
from rlhf.functional import learning_rate_factor
from rlhf.metrics import MetricsWriter
from rlhf.models import what_to_save
from rlhf.ppo.critic import critic_base
from rlhf.ppo.evaluation import Evaluator, describe_selection, selection_value
from rlhf.ppo.optimizer import describe_optimizers
from rlhf.ppo.preflight.memory import copies_checkpoint
from rlhf.ppo.result import PPOResult, closing_table
from rlhf.ppo.scoring import describe_scoring
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.watchdog import Watchdog
from rlhf.scorers import judges

SHOWN = {"score": "score", "kl": "kl", "response_length": "len", "eos_rate": "eos"}


class PPOLoop:
    """Trains until the end, or until interrupted.

    Attributes:
        before, last: metrics of the evaluation before the first update, and of the latest one.
        best: `update`, `value` and `metrics` of the best evaluated update by `evaluation.select`,
            whose checkpoint is kept; None before the first one, or if the last update is taken.
        pending: arguments of `_end_update` for an update that is not evaluated yet; else None.
    """

    def __init__(
        self, config: PPOStageConfig, trainer: PPOTrainer, evaluator: Evaluator, splits: Splits
    ):
        self.config, self.trainer, self.evaluate, self.splits = config, trainer, evaluator, splits
        self.directory = trainer.directory
        self.watchdog = Watchdog(config, self.directory)
        self.checkpoints = CheckpointWriter(config, copies_checkpoint(trainer))
        self.before: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.pending: dict[str, bool] | None = None
        self._random_state: dict[str, Any] | None = None  # as of the end of the latest update
        self.samples_file = self.directory / "samples.jsonl"

    def run(self) -> PPOResult:
        """Train to the end, or until interrupted; write `final/`."""
        trainer = self.trainer
        self._resume()
        if kernels := describe_optimizers(trainer.updater.optimizers):
            say(f"optimiser: {kernels}")
        writer = MetricsWriter(self.directory, self.config, "ppo", run_id(self.directory))
        try:
            with GracefulStop(self.config.checkpoint.grace_seconds, self.directory) as stop:
                interrupted = self._train_or_save(writer, stop)
            if not interrupted:
                return self._finish()
        except NonFiniteError as error:
            self.checkpoints.abandon(self.config.checkpoint.grace_seconds)
            spoilt = not trainer.updater.num_steps
            step, dtype = trainer.update + 1, trainer.actors.policy.dtype
            raise explain_stop(self.config, self.directory, error, step, spoilt, dtype) from error
        except (KeyboardInterrupt, SystemExit):
            self.checkpoints.abandon()
            raise
        finally:
            self.checkpoints.abandon(self.config.checkpoint.grace_seconds)
            writer.close()
            write_curves(self.directory, "ppo", self.config.run_name)
        say(f"stopped after update {trainer.update}; continue with {resume_overrides(self.config)}")
        return PPOResult(
            None,
            self.last,
            before=self.before,
            update=trainer.update,
            stage_dir=self.directory,
            stopped_by=stop.signal,
        )

    def _train_or_save(self, writer: MetricsWriter, stop: GracefulStop) -> bool:
        """As `_train`. If bad input ends it, such as a scorer that fails, save the last finished
        update first. Bad input ends all processes together: see `on_every_process`."""
        trainer, began_at = self.trainer, self.trainer.update
        try:
            interrupted = self._train(writer, stop)
            self.checkpoints.finish()
            return interrupted
        except InputError as error:
            # the weights themselves may be wrong, or are those of half an update
            spoilt = isinstance(error, NonFiniteError) or trainer.updater.num_steps > 0
            if spoilt or trainer.update == 0 or self.checkpoints.failed:
                raise
            if trainer.update > began_at:
                self._save()
            self.checkpoints.finish()
            checkpoint = self.directory / f"checkpoint-{trainer.update}"
            raise InputError(
                f"{error}; update {trainer.update} is saved in {checkpoint}: correct the cause, "
                f"then continue with {resume_overrides(self.config)}"
            ) from error

    def _train(self, writer: MetricsWriter, stop: GracefulStop) -> bool:
        """Make the updates; return True if a signal ended them early, with a checkpoint saved."""
        trainer, config = self.trainer, self.config
        every, end = config.checkpoint_every, config.ppo.num_updates
        planned = range(every * (trainer.update // every + 1), end, every)
        refuse_taken_steps(self.directory, [*planned, end])
        if trainer.update == 0:
            self.before = self._evaluate(writer)
        self._random_state = random_state()
        last = interrupted = False
        if self.pending is not None:
            last, interrupted = self._end_update(writer, stop, **self.pending)
        began = time.perf_counter()
        with progress_bar(config.ppo.num_updates, trainer.update, "update") as bar:
            while trainer.update < config.ppo.num_updates and not last and not interrupted:
                started = time.perf_counter()
                metrics = trainer.step()
                ended, collected = time.perf_counter(), trainer.collected_at
                num_tokens = metrics["response_length"] * config.ppo.batch_size
                metrics |= {
                    "collect_seconds": collected - started,
                    "optimize_seconds": ended - collected,
                    "tokens_per_second": num_tokens / (ended - started),
                    "seconds": ended - began,
                }
                shown = {short: f"{metrics[name]:.3g}" for name, short in SHOWN.items()}
                bar.set_postfix(shown, refresh=False)
                bar.update(1)
                writer.write(trainer.update, metrics)
                over_budget = "kl_budget" in self.watchdog.check(trainer.update, metrics)
                self._random_state = random_state()
                last, interrupted = self._end_update(writer, stop, over_budget)
        return interrupted

    def _end_update(
        self, writer: MetricsWriter, stop: GracefulStop, over_budget: bool
    ) -> tuple[bool, bool]:
        """Evaluate and save, if due; return whether this update is the last, and whether a signal
        ends the run after it."""
        update, config = self.trainer.update, self.config
        last = over_budget or update == config.ppo.num_updates
        improved = False
        if last or update % config.evaluation.every == 0:
            self.pending = {"over_budget": over_budget}
            self.last = self._evaluate(writer)
            improved = self._keep_best(self.last)
            self.pending, self._random_state = None, random_state()
        interrupted = stop.requested() and not last
        is_due = update % config.checkpoint_every == 0 or improved or interrupted
        # the last update too, for a longer run; one over the budget would go on from there
        if update == config.ppo.num_updates or (is_due and not last):
            self._save()
        return last, interrupted

    def _evaluate(self, writer: MetricsWriter) -> dict[str, float]:
        if not self.evaluate.prompts:
            return {}
        with phase(f"evaluation after update {self.trainer.update}"):
            metrics, samples = self.evaluate()
        writer.write(self.trainer.update, metrics)
        writer.write_samples(self.trainer.update, self.samples_file, samples)
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> bool:
        """Remember the evaluation if it is the best so far; return whether it is."""
        value = selection_value(self.config, metrics)
        if value is None or (self.best is not None and value <= self.best["value"]):
            return False
        self.best = {"update": self.trainer.update, "value": value, "metrics": metrics}
        return True

    def _finish(self) -> PPOResult:
        """Write `final/` from the best update, and say which update that is."""
        trainer, config = self.trainer, self.config
        updates_made = chosen = trainer.update
        metrics = self.last
        if self.best is not None:
            chosen, metrics = self.best["update"], self.best["metrics"]
            if chosen != updates_made:
                best = self.directory / f"checkpoint-{chosen}"
                copy_to_all_hosts(best)
                load_modules(best, self._modules())
        with phase("writing final/"):
            self._write_result(metrics | {"update": chosen})
        number = len(self.evaluate.prompts)
        text = closing_table(config, self.before, metrics, chosen, number)
        self._report(chosen, updates_made, text)
        return PPOResult(
            self.directory / "final",
            metrics,
            before=self.before,
            update=chosen,
            table=text,
            stage_dir=self.directory,
        )

    def _write_result(self, figures: dict[str, float]) -> None:
        """Write `critic/` and `final/`, on the main process, to which all send what is sharded."""
        actors, config = self.trainer.actors, self.config
        # elsewhere None: it takes hashes of whole models
        record = self._record(figures) if self.trainer.accelerator.is_main_process else None
        self._write_critic(record)  # first: a run with final/ counts as finished
        with self.trainer.updater.averaged_weights():
            parts = actors.policy, config.peft, config.model.path, config.model.revision
            policy, adapter = what_to_save(*parts, self.directory)
            if record is not None:
                final, tokenizer = self.directory / "final", actors.tokenizer
                write_stage(final, policy, tokenizer, config, record, write_adapter=adapter)

    def _record(self, figures: dict[str, float]) -> StageRecord:
        """What `final/rlhf.json` says."""
        actors, config = self.trainer.actors, self.config
        origin = config.model.path, actors.tokenizer, self.splits.prompts, self.splits.dropped
        record = make_record("ppo", config, *origin, figures)
        record.reference = config.ppo.reference
        record.sampling, record.scoring = actors.sampling, describe_scoring(config, actors)
        record.shared_base = actors.shared_base or None
        record.frozen = actors.frozen or None
        record.other_forwards = actors.other_forwards or None
        record.compiled = actors.compiled or None
        record.optimizer = describe_optimizers(self.trainer.updater.optimizers) or None
        record.sharding = actors.describe_sharding(self.trainer.accelerator)
        record.reference_weights = parent_weights(record.reference)
        return record

    def _write_critic(self, record: StageRecord | None) -> None:
        """Write the critic of the policy in `final/`, for `critic.init` of a later run; its values
        are (raw - score_mean) / score_std."""
        critic, tokenizer = self.trainer.actors.critic, self.trainer.actors.tokenizer
        if critic is None or self.trainer.actors.shares_trunk:
            return
        base, revision = critic_base(self.config)
        parts = critic.model, self.config.peft, base, revision
        model, adapter = what_to_save(*parts, self.directory)
        if record is None:
            return
        own = replace(record, stage="critic", score_mean=critic.mean, score_std=critic.std)
        own.other_forwards = None
        own.parent, own.parent_weights = base, parent_weights(base)
        directory = self.directory / "critic"
        write_stage(directory, model, tokenizer, self.config, own, write_adapter=adapter)

    def _report(self, chosen: int, updates_made: int, closing: str) -> None:
        if closing:
            say(f"\n{closing}")
        if self.watchdog.summary():
            say(self.watchdog.summary())
        others = [] if self.evaluate.independent is None else [self.evaluate.independent]
        for scorer in (self.trainer.actors.scorer, *others):
            for judge in judges(scorer):
                say(f"\n{judge.summary()}")
        before = selection_value(self.config, self.before)
        if self.best is not None and before is not None and self.best["value"] <= before:
            warn(
                f"by {describe_selection(self.config)}, no evaluated update is better than the "
                "policy before training; the same command with preflight=only shows what the "
                "scorer leaves to gain"
            )
        rule = describe_selection(self.config) if self.best is not None else "the last"
        say(
            f"\nsaved {describe_saved(self.directory / 'final')}: the policy after update {chosen} "
            f"of {updates_made} ({rule})"
        )

    def _modules(self) -> dict[str, Any]:
        actors, averages = self.trainer.actors, self.trainer.updater.averages
        modules = {"policy": actors.policy, "critic": actors.critic, "averages": averages}
        return {name: module for name, module in modules.items() if module is not None}

    def _save(self) -> None:
        state = self.trainer.state() | {
            "before": self.before,
            "last": self.last,
            "best": self.best,
            "pending": self.pending,
            "baseline": self.evaluate.baseline,
            "baseline_responses": self.evaluate.baseline_responses,
            "watchdog": self.watchdog.state(),
        }
        checkpoint = self.directory / f"checkpoint-{self.trainer.update}"
        with phase(f"saving {checkpoint.name}"):
            optimizers = self.trainer.updater.optimizers
            parts = self._modules(), optimizers, state
            self.checkpoints.save(checkpoint, *parts, self._random_state)

    def _resume(self) -> None:
        checkpoint = checkpoint_to_resume(self.config, self.directory)
        if checkpoint is None:
            return
        optimizers = self.trainer.updater.optimizers
        state = load_training_state(checkpoint, self._modules(), optimizers)
        self.trainer.load_state(state)
        self.before, self.last, self.best = state["before"], state["last"], state["best"]
        self.evaluate.baseline, self.pending = state["baseline"], state.get("pending")
        self.evaluate.baseline_responses = state.get("baseline_responses", [])
        self.watchdog.load_state(state["watchdog"])
        self._say_new_schedule(read_settings(checkpoint)["ppo.num_updates"])

    def _say_new_schedule(self, old: int) -> None:
        """Say how the learning rate goes on where a run of `old` updates has another length."""
        ppo, update = self.config.ppo, self.trainer.update
        if ppo.num_updates != old and ppo.lr_schedule == "linear" and update < ppo.num_updates:
            warm_up = ppo.lr_schedule, ppo.lr_warmup_updates, ppo.lr_warmup_start
            was, now = (
                self.trainer.updater.rates["policy"] * learning_rate_factor(update, end, *warm_up)
                if update < end
                else 0.0
                for end in (old, ppo.num_updates)
            )
            say(
                f"learning rate: the linear schedule now ends at update {ppo.num_updates} instead "
                f"of {old}; update {update + 1} has {now:.3g} instead of {was:.3g}"
            )
