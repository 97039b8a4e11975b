"""The command line of `python -m rlhf.diagnose`, and what it finds in a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.checkpoint import read_record
from rlhf.config import (
    CONFIG_FILE,
    STAGES,
    EndpointConfig,
    InputError,
    PPOStageConfig,
    ScorerConfig,
    has_weights,
    knob,
    load_config,
    refuse,
    refuse_named_code,
    with_default_paths,
)
from rlhf.data import Row, different_prompts, load_splits, prompt_of
from rlhf.generate.sample import read_prompts
from rlhf.inputs import Check, check_model, check_scorer, failures

ANSWERS = ("prompt", "messages", "responses", "response", "ranks", "scores")  # no columns


@dataclass(kw_only=True)
class DiagnoseOptions(EndpointConfig):
    """The command line."""

    run_name: str | None = None
    """Run in runs_dir; its stages, scorer and rows are used where no option names others."""
    path: str | None = None
    """Directory of a run, such as runs/mine, in place of run_name."""
    runs_dir: str = "runs"
    """Folder of the runs."""
    gold: str | None = None
    """Scorer that you trust: module.function, a reward model, a URL or judge:<rubric> (default:
    evaluation.scorer of the run's PPO stage, else held-out rankings)."""
    sft: str | None = None
    """Policy before PPO (default: the one that the run's PPO stage started from, else its SFT)."""
    reward: str | None = None
    """Scorer that PPO trains on (default: the run's)."""
    ppo: str | None = None
    """Policy after PPO (default: the run's; a run without one is diagnosed before PPO)."""
    prompts: str | None = None
    """Prompts, as in rlhf.generate, with a known-good answer as `reference` (default: the held-out
    rows of the run's reward model; their best-ranked answers are known to be good)."""
    good: float | None = None
    """Gold score of a good answer, where rows have none or a poor one."""
    num_prompts: int = knob(64, ge=2)
    """Held-out prompts, at most."""
    samples_per_prompt: int = knob(16, ge=2)
    """Answers of the SFT policy to each prompt; best-of-n ends here."""
    response_length: int | None = knob(None, ge=1)
    """Longest answer, tokens (default: that of the run's PPO stage, else 256)."""
    temperature: float | None = knob(None, gt=0)
    """Of the answers (default: that of the run's PPO stage, else 1)."""
    batch_size: int = knob(64, ge=1)
    """Sequences that are sampled or scored together."""
    seed: int = knob(1, ge=0)
    """Equal seeds give equal answers."""
    out: str | None = None
    """Folder to write (default: diagnosis in the directory of the run)."""
    trust_remote_code: bool = False
    """true: the models' own Python files, and functions named in the run's config.yaml, may run."""

    @property
    def directory(self) -> Path | None:
        """The directory of the run, if one is named."""
        if self.path:
            return Path(self.path).expanduser()
        return Path(self.runs_dir) / self.run_name if self.run_name else None

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else (self.directory or Path()) / "diagnosis"


@dataclass
class Subject:
    """What is diagnosed.

    Attributes:
        scorer: what PPO trains on.
        gold: the trusted scorer; None: held-out rankings only.
        rows: canonical held-out rows.
        source: where they come from.
        config: of the run's PPO stage, or one with the defaults.
        penalty: score of an answer that does not end, where PPO has one.
        finals: the finished stages of the run.
    """

    sft: str
    scorer: ScorerConfig
    ppo: str | None
    gold: ScorerConfig | None
    rows: list[Row]
    source: str
    config: PPOStageConfig
    penalty: float | None = None
    finals: dict[str, Path] = field(default_factory=dict)

    @property
    def scorer_name(self) -> str:
        return self.scorer.path or "scorer.components"


def find_subject(options: DiagnoseOptions) -> Subject:
    """Find models, scorers and rows; no model is loaded."""
    run = options.directory
    if (options.run_name is None) == (options.path is None) and not options.sft:
        raise InputError("give run_name=<run>, path=<directory of a run>, or sft= and reward=")
    done = {name: final for name in STAGES if run and (final := run / name / "final").is_dir()}
    if run and not done and not options.sft:
        raise InputError(f"{run} has no finished stage: no {run}/sft/final; give sft= and reward=")
    config = _ppo_config(options, done)
    sft = options.sft or config.model.path or str(done.get("sft", ""))
    scorer = config.scorer
    if options.reward:
        scorer = ScorerConfig(options.reward, "none", options.batch_size, endpoint=options)
    elif not scorer.path and not scorer.components and "reward" in done:
        scorer = ScorerConfig(str(done["reward"]), "none", options.batch_size)
    missing = {"sft": sft, "reward": scorer.path or scorer.components}
    where = f" and {run} has no such stage" if run else ""
    refuse([f"{n} is missing{where}: add {n}=<path>" for n, value in missing.items() if not value])
    ppo = options.ppo or (str(done["ppo"]) if "ppo" in done else None)
    path = options.gold or config.evaluation.scorer
    gold = ScorerConfig(path, "none", options.batch_size, endpoint=options) if path else None
    refuse([*failures(_checks(options, sft, ppo, scorer, gold))])
    rows, source = _rows(options, done, config, sft)
    rows = different_prompts(rows)[: options.num_prompts]
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} prompts; give prompts=<a file with more>")
    # of a scorer that PPO did not have, the scale of the penalty is not known
    penalty = config.eos_penalty if scorer is config.scorer else None
    return Subject(sft, scorer, ppo, gold, rows, source, config, penalty, done)


def _ppo_config(options: DiagnoseOptions, done: dict[str, Path]) -> PPOStageConfig:
    if "ppo" not in done:
        return PPOStageConfig()
    file = done["ppo"] / CONFIG_FILE
    config = load_config(PPOStageConfig, file)
    config.run_name, config.runs_dir = done["ppo"].parents[1].name, str(done["ppo"].parents[2])
    components = enumerate(config.scorer.components)
    parts = {f"scorer.components[{i}]": part.path for i, part in components}
    named = {"scorer.path": config.scorer.path, "evaluation.scorer": config.evaluation.scorer}
    if not options.trust_remote_code:
        own = {"scorer.path": options.reward, "evaluation.scorer": options.gold}
        refuse_named_code({n: p for n, p in (named | parts).items() if not own.get(n)}, file)
    return with_default_paths(config)


def _checks(
    options: DiagnoseOptions,
    sft: str,
    ppo: str | None,
    scorer: ScorerConfig,
    gold: ScorerConfig | None,
) -> Iterator[Check]:
    code = options.trust_remote_code
    yield partial(check_model, sft, "sft", ("sft", "ppo"), code=code)
    if ppo:
        yield partial(check_model, ppo, "ppo", ("sft", "ppo"), code=code)
    if scorer.path:
        yield partial(check_scorer, scorer.path, scorer.endpoint, "reward", code)
    if gold:
        yield partial(check_scorer, str(gold.path), options, "gold", code)


# --- Held-out rows --------------------------------------------------------------------------------


def _rows(
    options: DiagnoseOptions, done: dict[str, Path], config: PPOStageConfig, sft: str
) -> tuple[list[Row], str]:
    """Canonical rows that no stage trained on, and where they come from."""
    if options.prompts:
        questions, _ = read_prompts(Path(options.prompts).expanduser())
        asked = [question for question in questions if question.not_answered is None]
        return [{**q.kept, "prompt": q.prompt} for q in asked], options.prompts
    order = ["reward", "ppo", "sft"] if has_weights(config.scorer.path) else ["ppo", "sft"]
    for stage in order:
        if stage in done and (found := _held_out(options, stage, done[stage], sft)):
            return found
    raise InputError("no held-out prompts: add prompts=<a .jsonl file of prompts>")


def _held_out(
    options: DiagnoseOptions, stage: str, final: Path, sft: str
) -> tuple[list[Row], str] | None:
    """The held-out rows of a stage; None where it was given rows from memory."""
    file = final / CONFIG_FILE
    config: Any = load_config(STAGES[stage], file)
    data = config.dataset
    if data.path is None:
        return None
    if not options.trust_remote_code:
        names = {"path": data.path, "eval_path": data.eval_path}
        refuse_named_code({f"dataset.{name}": str(path) for name, path in names.items()}, file)
    prompts = getattr(read_record(sft), "prompts", None)
    try:
        rows = load_splits(data, stage, config.seed, parent_prompts=prompts).eval
    except InputError as error:
        fix = "give other rows: prompts=<a .jsonl file>"
        raise InputError(f"the held-out rows of {final}: {error}; {fix}") from error
    return rows, f"{data.eval_path or data.path} (held-out rows of {final.parent})"


def good_answers(row: Row) -> list[str]:
    """The known-good answers of a row: the best-ranked, the reference, or the demonstration."""
    if "ranks" in row:
        pairs = zip(row["responses"], row["ranks"], strict=True)
        return [response for response, rank in pairs if rank == min(row["ranks"])]
    if isinstance(row.get("reference"), str):
        return [row["reference"]]
    messages = row.get("messages") or []
    start = len(prompt_of(row)) if messages else 0
    return [messages[start]["content"]] if start < len(messages) else []


def columns_of(row: Row) -> dict[str, Any]:
    """What a Python scorer gets of a row."""
    return {name: value for name, value in row.items() if name not in ANSWERS}
