"""Trackers: where metrics go in addition to `metrics.jsonl`, through the classes of accelerate.

`rlhf.metrics` decides what a row holds. Tables of samples go to Weights & Biases only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config import StageConfig, dotted, plain_values


class Trackers:
    """The trackers of one run, on the main process.

    The x-axis is our own step, so that a resumed run continues its curves.
    """

    def __init__(
        self, directory: Path, config: StageConfig, stage: str, run_id: str | None, next_step: int
    ):
        """Start or continue the run in each tracker.

        Args:
            run_id: names the run in Weights & Biases.
            next_step: rows of a stopped run from this step on are dropped, where a tracker can.
        """
        self._wandb: Any = None
        self._others: list[Any] = []
        if not config.tracker.names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # its loggers need it
        label, project = f"{config.run_name}/{stage}", config.tracker.project
        values = {  # of types that every tracker takes as a hyper-parameter
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in dotted(plain_values(config)).items()
            if value != {}
        }
        for name in config.tracker.names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            if name == "wandb":
                tracker = tracker_class(project, **wandb_options(directory, config, label, run_id))
            elif name == "tensorboard":  # the directory is the label: `tensorboard --logdir runs`
                tracker = tracker_class(name, directory, purge_step=next_step)
            elif name == "trackio":
                tracker = tracker_class(project, name=label, resume="allow")
            elif tracker_class.requires_logging_directory:
                tracker = tracker_class(project, directory)
            else:
                tracker = tracker_class(project)
            tracker.start()
            tracker.store_init_configuration(values)
            if name == "wandb":
                self._wandb = tracker.tracker
                self._wandb.define_metric("*", step_metric="step")
            else:
                self._others.append(tracker)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        if self._wandb is not None:  # its own step counts calls: ours is a metric
            self._wandb.log({"step": step} | row)
        for tracker in self._others:
            tracker.log({n: value for n, value in row.items() if value is not None}, step=step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Log sampled responses as a table."""
        if self._wandb is None or not samples:
            return
        import wandb

        columns: list[Any] = list(samples[0])
        data = [[str(s[c]) if c == "prompt" else s[c] for c in columns] for s in samples]
        self._wandb.log({"step": step, "samples": wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        """Finish the run in each tracker."""
        if self._wandb is not None:
            self._wandb.finish()
        for tracker in self._others:
            tracker.finish()


def wandb_options(
    directory: Path, config: StageConfig, label: str, run_id: str | None
) -> dict[str, Any]:
    import wandb

    tracker = config.tracker
    return {
        "entity": tracker.entity,
        "mode": tracker.mode,
        "name": label,
        "dir": str(directory),
        "id": run_id,
        "resume": "allow",
        "settings": wandb.Settings(silent=True),
    }
