"""`mode=lm_eval`: the tasks of lm-evaluation-harness on a trained policy, asked as in its training.

It adds the model's own chat template and stop strings; the rest is the harness. Left out: other
back ends than transformers, several processes.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.checkpoint.disk import write_whole
from rlhf.config import InputError
from rlhf.console import say, table
from rlhf.evaluate.options import EvaluateOptions
from rlhf.policy import Policy, PolicyOptions

RESULT = "lm_eval.json"
NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def run_harness(options: EvaluateOptions) -> None:
    """Run the tasks, write `lm_eval.json` next to the model's record, and print the table."""
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [task for task in options.tasks if is_task_file(task)]
    names = [task for task in options.tasks if not is_task_file(task)]
    folders = list(dict.fromkeys(str(Path(file).expanduser().parent) for file in files))
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    names += [task_name(file) for file in files]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise InputError(
            f"tasks={unknown[0]}: lm-eval has no such task; `lm-eval ls tasks` lists them, a "
            ".yaml file is one of your own"
        )
    path, code = str(options.path), options.trust_remote_code
    policy = Policy(PolicyOptions(path, options.system, trust_remote_code=code), path)
    asked = f"as text ({policy.why_text})" if policy.why_text else "with its chat template"
    ends = ", ".join(map(repr, stop_texts(policy)))
    say(f"{path} is asked {asked}; its answers end at {ends} or as the task says")
    try:
        found = simple_evaluate(
            harness_model(policy, options.batch_size),
            tasks=names,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            system_instruction=options.system,
            apply_chat_template=policy.why_text is None,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"tasks={','.join(options.tasks)}: lm-eval failed, {reason}") from error
    results = dict(results_of(found, options))
    show(results)
    say(f"\nsaved {save(options, policy, results)}")


def require_harness() -> None:
    """Raise InputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("mode=lm_eval needs the lm-eval package: pip install 'rlhf[eval]'")


def is_task_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def task_name(file: str) -> str:
    """The name of the task in a file."""
    text = Path(file).expanduser().read_text(encoding="utf-8")
    found = re.search(r"^task:\s*['\"]?([^\s'\"]+)", text, re.M)
    if found is None:
        raise InputError(f"tasks={file} has no line `task: <name>`")
    return found[1]


def harness_model(policy: Policy, batch_size: int) -> Any:
    """The policy as a model of the harness, whose answers end where they ended in training."""
    from lm_eval.models.huggingface import HFLM

    stops = stop_texts(policy)

    class StageModel(HFLM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                context, settings = request.args
                until = settings.get("until") or []
                until = [until] if isinstance(until, str) else until
                request.arguments = (context, settings | {"until": [*until, *stops]})
            return super().generate_until(requests, disable_tqdm)

    return StageModel(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=batch_size)


def stop_texts(policy: Policy) -> list[str]:
    """What ends an answer: stop strings, and the texts of end tokens."""
    strings = policy.sampling.stop_strings
    ends = [policy.tokenizer.decode([i]) for i in policy.sampling.stop_ids]
    return list(dict.fromkeys([*(strings.strings if strings else ()), *filter(None, ends)]))


def results_of(
    found: dict[str, Any], options: EvaluateOptions
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield each task with its metrics, {"value", "stderr"} each."""
    for task, values in found["results"].items():
        metrics: dict[str, Any] = {}
        for key, value in values.items():
            name, _, rule = key.partition(",")
            if name in NO_METRICS or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{rule}")
            label = name if rule in ("", "none") else f"{name} ({rule})"
            metrics[label] = {"value": value, "stderr": error if error != "N/A" else None}
        counts = found.get("n-samples", {}).get(task, {})
        yield (
            task,
            {
                "metrics": metrics,
                "num_rows": counts.get("effective"),
                "num_fewshot": found.get("n-shot", {}).get(task),
                "version": found.get("versions", {}).get(task),
                "limit": options.limit,
            },
        )


def show(results: dict[str, Any]) -> None:
    """Print a row for each metric."""
    rows = [
        (task, result["num_rows"], name, value["value"], value["stderr"])
        for task, result in results.items()
        for name, value in result["metrics"].items()
    ]
    say(f"\n{table(rows, ('task', 'rows', 'metric', 'value', 'standard error'))}")


def save(options: EvaluateOptions, policy: Policy, results: dict[str, Any]) -> Path:
    """Write the results, with those of other tasks that are there; return the file."""
    from lm_eval import __version__

    from rlhf.checkpoint import hash_weights
    from rlhf.tokenizer import hash_template

    own = Path(str(options.path)).expanduser()
    folder = Path(options.out or (own if own.is_dir() else options.folder))
    now = {
        "path": options.path,
        "weights": hash_weights(own) if own.is_dir() else None,
        "template": None if policy.why_text else hash_template(policy.tokenizer),
        "system": options.system,
        "lm_eval": __version__,
    }
    file = folder / RESULT
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same = all(before.get(name) == value for name, value in now.items())
    tasks = (before.get("tasks", {}) if same else {}) | results
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(now | {"tasks": tasks}, indent=2) + "\n")
    return file
