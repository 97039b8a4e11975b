"""What the command line gives a stage, examined before torch is imported: settings, paths, rows.

Everything that is wrong is reported at once. The functions that refuse here are those that the
stage calls later. Left out: what only transformers or the weights show, and data on the Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from rlhf.checkpoint import finished_run, require_stage
from rlhf.checkpoint.lock import LOCK
from rlhf.checkpoint.run_directory import refuse_used_directory
from rlhf.config import (
    EndpointConfig,
    InputError,
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    StageConfig,
    is_judge,
    is_python,
    is_remote,
    load_object,
    problems_of,
    refuse,
    refused_file,
    with_default_paths,
)
from rlhf.data import load_splits, resolve_format
from rlhf.data.read import read_rows
from rlhf.http_endpoint import check_endpoint
from rlhf.hub import config_directory, find_source, is_hub_id, tokenizer_directory
from rlhf.rubrics import read_rubric
from rlhf.tokenizer import chat_template_text, named_templates
from rlhf.vllm_server import check_server

MOST_BYTES = 64e6  # the rows of a larger file are read by the stage alone
PARENTS = {"sft": ("sft", "ppo"), "reward": ("sft",), "ppo": ("sft", "ppo")}
Check = Callable[[], object]


def check_inputs(
    config: StageConfig, stage: str, earlier: Collection[str] = (), known: Sequence[str] = ()
) -> None:
    """Check everything about a stage's command that needs no torch.

    Args:
        earlier: stages that will have ended before this one begins, in a pipeline.
        known: problems that were found before; missing values may follow from them.

    Raises:
        InputError: lists all problems, each with its fix.
    """
    problems, missing = problems_of(config)
    problems = [*known, *problems]
    try:
        is_finished = finished_run(config, stage) is not None
    except InputError as error:
        problems.append(str(error))
        is_finished = True
    if not is_finished:
        config = with_default_paths(config)
        awaited = [str(config.stage_dir(name) / "final") for name in earlier]
        problems += failures(_checks(config, stage, awaited))
    refuse(problems, [] if known else missing)


def check_model(
    path: str, field: str, stages: tuple[str, ...], revision: str | None = None, code: bool = False
) -> None:
    """Check a model's directory: its files, the stage that wrote it, its weights. The weights of a
    Hub id are not downloaded here."""
    require_stage(path, stages, field, revision)
    find = config_directory if is_hub_id(path) else find_source
    find(path, field, revision, code)


def check_scorer(path: str, endpoint: EndpointConfig, field: str, code: bool = False) -> None:
    """Check what a scorer's path names: a judge, something that listens, a Python function, or a
    directory."""
    if is_judge(path):
        read_rubric(path, field)
        check_judge(endpoint, field, code)
    elif is_remote(path):
        check_endpoint(path, endpoint, field)
    elif is_python(path):
        load_object(path, field)
    else:
        check_model(path, field, ("reward",), code=code)


def check_judge(endpoint: EndpointConfig, field: str, code: bool = False) -> None:
    """Check the model that judges; `field` is the setting that asks for a judge."""
    prefix = endpoint_prefix(field)
    if not endpoint.model:
        raise InputError(
            f"a judge needs {prefix}model=<its name> and {prefix}url=<its endpoint>, such as "
            f"http://127.0.0.1:8000/v1; or {prefix}model=<directory>"
        )
    if endpoint.prices and len(endpoint.prices) != 2:
        raise InputError(f"{prefix}prices must be two numbers, got {endpoint.prices}")
    if endpoint.url is not None:
        check_endpoint(endpoint.url, endpoint, f"{prefix}url")
    else:
        check_model(endpoint.model, f"{prefix}model", ("sft", "ppo"), code=code)


def endpoint_prefix(field: str) -> str:
    """What the names of the endpoint's settings begin with: nothing in commands, which have them as
    options."""
    return "scorer.endpoint." if field.startswith(("scorer.", "evaluation.")) else ""


def check_template(name: str, source: str, field: str = "model.chat_template") -> None:
    """Check the name of a chat template; `source` is the directory of the tokenizer."""
    if Path(source).is_dir():
        chat_template_text(name, field, named_templates(Path(source)))
    elif not is_hub_id(source):
        chat_template_text(name, field)


def failures(checks: Iterable[Check]) -> Iterator[str]:
    """Do all checks; yield what those that fail say."""
    for check in checks:
        try:
            check()
        except InputError as error:
            yield str(error)
        except OSError as error:
            yield refused_file(error)


def _check_directory(config: StageConfig, stage: str) -> None:
    # of a run that is going on, the lock says more
    if not (config.stage_dir(stage) / LOCK).exists():
        refuse_used_directory(config, stage)


def _checks(config: StageConfig, stage: str, awaited: Collection[str]) -> Iterator[Check]:
    if getattr(config, "preflight", None) != "only":
        yield lambda: _check_directory(config, stage)
    yield lambda: check_rows(config, stage)
    yield from _other_sources(config)
    model = config.model
    if model.path is not None and model.path not in awaited:
        code = model.trust_remote_code
        yield lambda: check_model(
            str(model.path), "model.path", PARENTS[stage], model.revision, code
        )
    yield from _tokenizer_checks(model, awaited)
    if isinstance(config, PPOStageConfig):
        if (reference := config.ppo.reference) is not None and reference not in awaited:
            yield partial(check_model, reference, "ppo.reference", PARENTS["ppo"])
        yield partial(check_server, config.sampling)
        yield from _scorer_checks(config, awaited)


def check_rows(config: StageConfig, stage: str) -> None:
    """Read the rows as the stage will; what they say is said by the stage."""
    data = config.dataset
    for field, path in {"path": data.path, "eval_path": data.eval_path}.items():
        if str(path).startswith("python:"):
            load_object(str(path), f"dataset.{field}")
    if data.format is not None and data.path is not None:
        resolve_format(data.format)
    paths = [path for path in (data.path, data.eval_path) if path is not None]
    if paths and all(map(_is_small_file, paths)):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            load_splits(deepcopy(data), stage, config.seed, config.needs_eval)


def _is_small_file(path: Any) -> bool:
    """True for a file that is small, and for a path that only a missing file can have."""
    if not isinstance(path, str) or path.startswith("python:") or Path(path).is_dir():
        return False
    file = Path(path).expanduser()
    if file.is_file():
        return file.stat().st_size <= MOST_BYTES
    return bool(file.suffix) or not is_hub_id(path)


def _other_sources(config: StageConfig) -> Iterator[Check]:
    """Check that the first row of each further source can be read."""
    used = {
        "mix": isinstance(config, SFTStageConfig) and config.mix.fraction > 0,
        "ptx": isinstance(config, PPOStageConfig) and config.ptx.coef > 0,
        "normalization": isinstance(config, RewardStageConfig)
        and config.normalization.completions == "demonstrations",
    }
    for group in filter(used.get, used):
        source = getattr(config, group)
        if _is_small_file(source.path):
            yield partial(_read_first_row, source.path, source.split, f"{group}.path")


def _read_first_row(path: str, split: str, field: str) -> None:
    next(iter(read_rows(path, split, "ptx", field)), None)


def _tokenizer_checks(model: ModelConfig, awaited: Collection[str]) -> Iterator[Check]:
    own, code = model.tokenizer, model.trust_remote_code
    if own is not None and own.startswith("python:"):
        yield lambda: load_object(own, "model.tokenizer")
    elif own is not None:
        yield lambda: tokenizer_directory(own, "model.tokenizer", model.revision, code)
    source, template = own or model.path, model.chat_template
    if template is not None and source is not None and source not in awaited:
        yield lambda: check_template(template, source)


def _scorer_checks(config: PPOStageConfig, awaited: Collection[str]) -> Iterator[Check]:
    components = enumerate(config.scorer.components)
    paths = {f"scorer.components[{i}].path": component.path for i, component in components}
    paths |= {"scorer.path": config.scorer.path, "evaluation.scorer": config.evaluation.scorer}
    for field, path in paths.items():
        if not path or path in (*awaited, "python:") or path.endswith(".py"):
            continue  # nothing to look at, or refused by a rule
        yield partial(check_scorer, path, config.scorer.endpoint, field)
