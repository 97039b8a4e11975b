"""The command line of `python -m rlhf.evaluate`, and its checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rlhf.config import (
    JUDGE,
    NORMALIZATIONS,
    EndpointConfig,
    InputError,
    ScorerConfig,
    knob,
    refuse,
)
from rlhf.inputs import Check, check_model, check_scorer, failures
from rlhf.web.server import ServerOptions, bound, check_server

MODES = ("pairwise", "rewardbench", "lm_eval")
REPORT = "report.json"


@dataclass(kw_only=True)
class EvaluateOptions(EndpointConfig):
    """The command line."""

    mode: str = knob("pairwise", choices=MODES)
    """pairwise: compare the answers of two models; rewardbench: measure a reward model on pairs;
    lm_eval: the tasks of lm-evaluation-harness."""
    a: str | None = None
    """pairwise: the baseline: a model, or a .jsonl file of its answers."""
    b: str | None = None
    """pairwise: the model that is compared with it, or its answers."""
    prompts: str | None = None
    """pairwise: prompts that models answer, as in rlhf.generate."""
    by: str = knob("judge", choices=("judge", "scorer", "people"))
    """pairwise: judge: a language model compares the answers, in both orders; scorer: the higher
    score wins; people: in the page of rlhf.rank, blind, until Ctrl-C."""
    rubric: str = "helpfulness"
    """by=judge: what is compared: a name in conf/judge/, or a .yaml file."""
    scorer: str | None = None
    """by=scorer: a reward model, module.function, a URL, or judge:<rubric>."""
    port: int = knob(8765, ge=0, le=65535)
    """by=people: port of the page."""
    serve: bool = True
    """by=people: false: only read what people said so far."""
    gold: str | None = None
    """pairwise: .jsonl file of rows with `prompt` and `gold` (a, b or tie), by people: corrects the
    win rate for the errors of the judge."""
    path: str | None = None
    """rewardbench: the reward model, module.function, or a URL; lm_eval: the model."""
    tasks: list[str] = field(default_factory=list)
    """lm_eval: names of tasks, or .yaml files of your own, such as [arc_easy,mine.yaml]."""
    num_fewshot: int | None = knob(None, ge=0)
    """lm_eval: examples before each question (default: that of the task)."""
    limit: int | None = knob(None, ge=1)
    """lm_eval: the first rows of each task only."""
    data: str | None = None
    """rewardbench: rows with `prompt`, `chosen`, `rejected` and `subset`."""
    out: str | None = None
    """Folder to write (default: evaluation-<mode>; lm_eval: the model's own directory)."""
    response_length: int = knob(256, ge=1)
    """pairwise: longest answer of a model, tokens."""
    temperature: float | None = knob(None, ge=0)
    """pairwise: of the answers (default: each model's generation config, else 1)."""
    system: str | None = None
    """pairwise, lm_eval: system message of the answers."""
    seed: int = knob(1, ge=0)
    """Equal seeds give equal answers."""
    normalize: str = knob("none", choices=NORMALIZATIONS)
    """Scale of the scores of a reward model."""
    batch_size: int = knob(32, ge=1)
    """Sequences that are sampled or scored together."""
    trust_remote_code: bool = False
    """true: the models' own Python files may run."""

    @property
    def folder(self) -> str:
        return self.out or f"evaluation-{self.mode}"

    def scorer_config(self, path: str) -> ScorerConfig:
        return ScorerConfig(path, self.normalize, self.batch_size, endpoint=self)

    @property
    def judge_path(self) -> str:
        return f"{JUDGE}{self.rubric.removeprefix(JUDGE)}"


def check(options: EvaluateOptions) -> None:
    """Refuse options with which the mode cannot be run; no model is loaded."""
    missing, checks = RULES[options.mode]
    refuse([*missing(options)])
    if not is_finished(options):  # else no model is needed any more
        refuse([*failures(checks(options))])


def is_finished(options: EvaluateOptions) -> bool:
    """True if the output folder has its report; people may always go on, and so may lm_eval."""
    goes_on = options.mode == "lm_eval" or (options.mode == "pairwise" and options.by == "people")
    return not goes_on and (Path(options.folder) / REPORT).is_file()


def _missing_in_pairwise(options: EvaluateOptions) -> Iterator[str]:
    for name in ("a", "b"):
        if not getattr(options, name):
            yield f"{name} is missing; add {name}=<a model, or a .jsonl file of answers>"
    if options.by == "scorer" and not options.scorer:
        yield "by=scorer needs scorer=<a reward model, module.function, a URL or judge:<rubric>>"
    if options.by != "scorer" and options.scorer:
        yield f"scorer={options.scorer} needs by=scorer"
    models = [path for path in (options.a, options.b) if path and not is_answers(path)]
    if models and not options.prompts:
        yield f"prompts is missing; add prompts=<what {' and '.join(models)} should answer>"


def _pairwise_checks(options: EvaluateOptions) -> Iterator[Check]:
    code = options.trust_remote_code
    for name in ("a", "b", "prompts", "gold"):
        path = getattr(options, name)
        if path and (is_answers(path) or name in ("prompts", "gold")):
            yield partial(_check_file, path, name)
        elif path:
            yield partial(check_model, path, name, ("sft", "ppo"), code=code)
    if options.by == "people" and options.serve:
        yield partial(_check_page, options.port)
    elif options.by == "scorer":
        yield partial(check_scorer, str(options.scorer), options, "scorer", code)
    elif options.by == "judge":
        yield partial(check_scorer, options.judge_path, options, "rubric", code)


def _missing_in_rewardbench(options: EvaluateOptions) -> Iterator[str]:
    if not options.path:
        yield "path is missing; add path=<the reward model>"
    if not options.data:
        yield "data is missing; add data=<rows with prompt, chosen, rejected, subset>"


def _rewardbench_checks(options: EvaluateOptions) -> Iterator[Check]:
    yield partial(_check_file, str(options.data), "data")
    yield partial(check_scorer, str(options.path), options, "path", options.trust_remote_code)


def _missing_in_lm_eval(options: EvaluateOptions) -> Iterator[str]:
    if not options.path:
        yield "path is missing; add path=<a model, such as runs/mine/ppo/final>"
    if not options.tasks:
        yield "tasks is missing; add tasks=[<names of lm-eval's tasks, or .yaml files>]"


def _lm_eval_checks(options: EvaluateOptions) -> Iterator[Check]:
    from rlhf.evaluate.harness import is_task_file, require_harness

    yield require_harness
    path, code = str(options.path), options.trust_remote_code
    yield partial(check_model, path, "path", ("sft", "ppo"), code=code)
    for task in filter(is_task_file, options.tasks):
        yield partial(_check_file, task, "tasks")


def _check_page(port: int) -> None:
    """Refuse a port in use, and missing libraries, before a model answers."""
    check_server(ServerOptions.host, None)
    with bound(ServerOptions.host, port):
        pass


def _check_file(path: str, field: str) -> None:
    if not Path(path).expanduser().is_file():
        raise InputError(f"{field}={path} is not a file")


RULES = {
    "pairwise": (_missing_in_pairwise, _pairwise_checks),
    "rewardbench": (_missing_in_rewardbench, _rewardbench_checks),
    "lm_eval": (_missing_in_lm_eval, _lm_eval_checks),
}


def is_answers(path: str) -> bool:
    """True for a file of answers; anything else is a model."""
    return path.endswith((".jsonl", ".json", ".csv", ".parquet"))
