"""The command line of the three stages: Hydra composes the configuration, and an error of the user
becomes one clear message.

Left out: the `key=value` options of all other commands (`rlhf.option_parser`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.config import (
    CONF_DIR,
    STAGES,
    InputError,
    MissingValues,
    StageConfig,
    config_file_of_run,
    default_paths,
    explain,
    groups_of,
    hide,
    nothing_to_resume,
    read_run_config,
    refused_file,
    remember_references,
    schema,
    stage_help,
)
from rlhf.console import (
    accept_any_text,
    is_main_process,
    num_processes,
    print_error,
    print_help,
    rank,
    say,
)
from rlhf.overrides import (
    job_name,
    jobs,
    require_distinct,
    swept_keys,
    unreadable,
    with_texts,
    wrong_overrides,
)
from rlhf.slurm import group_of_tasks

Run = Callable[[Any], int | None]  # of a stage; returns the signal that interrupted it, if one did

# Hydra's options that take a value as the next argument, and those that only print something
VALUED = set("--config-dir -cd --config-name -cn --config-path -cp --cfg -c --package -p".split())
PRINTING = set("--hydra-help --info -i --version --cfg -c --package -p --resolve".split())
WORK = ("recipe=", "dataset=", "dataset.path=")  # with one of these, a user has data in mind
SUBMITS = "hydra/launcher=submitit_"
DEMO_HINT = "\n(recipe=demo runs the embedded demo, which needs none of them)"


@dataclass(frozen=True)
class _Command:
    """The command line of a stage."""

    stage: str
    options: list[str]
    own_files: bool  # with a --config-dir, where only Hydra finds them
    overrides: list[str]  # that can be read
    problems: list[str]  # of the others
    earlier: Collection[str] | None  # see `hydra_main`


def hydra_main(stage: str, run: Run, earlier: Collection[str] | None = None) -> None:
    """Run one stage from the command line.

    Without any argument, the stage runs the embedded demo (`recipe=demo`); options that only print
    show what it would run. With `resume=`, the command line changes the configuration that the run
    was started with. An `InputError` or an error of Hydra becomes one message and exit status 2;
    any other exception keeps its traceback. A run that a signal interrupted ends with status
    128 + signal, as in a shell. In a pipeline, the results of `earlier` stages will exist then.
    """
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        return print_help(stage_help(stage))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing and exiting
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    ConfigStore.instance().store(name=f"{stage}_schema", node=schema(STAGES[stage]))
    options, typed = _split_options(hydra_arguments(given))
    overrides = with_texts(typed, stage)
    own_files = any(option.startswith(("--config-dir", "-cd")) for option in options)
    wrong = wrong_overrides(overrides, stage, own_files)
    problems, overrides = list(wrong.values()), [o for o in overrides if o not in wrong]
    command = _Command(stage, options, own_files, overrides, problems, earlier)
    has_work = any(override.startswith(WORK) for override in given + overrides)
    only_prints = bool({option.partition("=")[0] for option in options} & PRINTING)
    if problems and only_prints:
        _refuse("\n".join(problems))
    sys.argv[1:] = options + overrides

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=stage)
    def task(node: Any) -> None:
        os.environ.update(group_of_tasks(os.environ))
        try:
            config = _composed_job(command, node)
        except InputError as error:
            is_new = isinstance(error, MissingValues) and not has_work
            _refuse(f"{error}{DEMO_HINT if is_new else ''}")
        run_to_exit(run, config)

    try:
        if not only_prints:
            _before_submission(command)
        task()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse("\n".join([*problems, explain_hydra(error, STAGES[stage])]))
    except YAMLError as error:
        _refuse(f"not valid YAML: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _refuse("interrupted; nothing saved is lost: the same with resume=auto goes on", status=130)


def _composed_job(command: _Command, node: Any) -> StageConfig:
    """Compose a run, or a job of a sweep; before the first job, all others are composed too, so
    that what cannot work is refused."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    typed, is_sweep = list(hydra.overrides.task), str(hydra.mode).endswith("MULTIRUN")
    config = _composed(command, node, typed, swept_keys(command.overrides) if is_sweep else [])
    if is_sweep and hydra.job.num == 0:
        _compose_jobs(command, [config])
    return config


def _compose_jobs(command: _Command, done: Sequence[StageConfig] = ()) -> list[StageConfig]:
    """Compose the jobs of a sweep, the first of which may be done; refuse two of one name."""
    from hydra import compose

    configs, swept = [*done], swept_keys(command.overrides)
    for job in jobs(command.overrides)[len(done) :]:
        configs.append(_composed(command, compose(command.stage, job), job, swept))
    require_distinct([config.run_name for config in configs])
    return configs


def _before_submission(command: _Command) -> None:
    """Refuse here what cannot work, before a launcher submits the jobs of a sweep: each would say
    so in a log of its own. Say where those logs are."""
    from hydra import initialize_config_dir

    launcher = next((o for o in command.overrides if o.startswith(SUBMITS)), None)
    if launcher is None:
        return
    if not {"-m", "--multirun"} & set(command.options):
        _refuse(f"{launcher} submits the jobs of a sweep: add -m (of one job, if need be)")
    if launcher.endswith("slurm") and not shutil.which("srun"):
        _refuse(
            f"{launcher}: this machine has no srun; submit where Slurm is installed, or try "
            "hydra/launcher=submitit_local here"
        )
    if command.own_files:
        return
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            configs = _compose_jobs(command)
    except InputError as error:
        _refuse(str(error))
    say(
        f"{launcher}: {len(configs)} jobs are submitted, and this command waits for them; their "
        f"output is in {configs[0].runs_dir}/.submitit/<job>/"
    )


def _composed(command: _Command, node: Any, typed: list[str], swept: list[str]) -> StageConfig:
    """Turn what Hydra composed into the stage's configuration, and check it.

    Args:
        typed: overrides of this run.
        swept: keys that differ between the jobs of a sweep.
    """
    from rlhf.inputs import check_inputs

    stage, earlier, problems = command.stage, command.earlier, command.problems
    try:
        config = _as_dataclass(node, STAGES[stage])
        name_sweep_run(config, swept, typed)
        if config.resume and not config.overwrite:
            config = _continued(config, stage, typed)
    except OmegaConfBaseException as error:
        raise InputError("\n".join([*problems, explain(error, STAGES[stage])])) from error
    except OSError as error:
        raise InputError("\n".join([*problems, refused_file(error)])) from error
    _require_typed_trust(config, typed)
    for key, final in default_paths(config).items():
        if earlier is not None and (final.is_dir() or final.parent.name in earlier):
            getattr(config, key.removesuffix(".path")).path = str(final)
    check_inputs(config, stage, earlier or (), problems)
    return config


# --- Running it -----------------------------------------------------------------------------------


def run_to_exit(run: Run, config: StageConfig) -> None:
    """Run a stage and exit with its status; an error on any process is printed with its rank."""
    accept_any_text()
    try:
        stopped_by = run(config)
    except InputError as error:
        _tell_launcher(str(error))
        if failures := _failures():
            failures.report(error)
        _exit(_with_rank(str(error)))
    except KeyboardInterrupt as error:  # the other processes may not be interrupted
        if failures := _failures():
            failures.report(error)
        raise
    except Exception as error:
        failures = _failures()
        if failures and failures.lost_the_others(error):
            message = failures.blame(error)
            _tell_launcher(message)
            _exit(message, status=1)  # a traceback would only show where this process waited
        _tell_launcher(traceback.format_exc())
        if failures:
            failures.report(error)
        if num_processes() > 1:
            where = failures.phase_of(error) if failures else "before training"
            print(f"error on rank {rank()} ({where}):", file=sys.stderr)  # the traceback follows
            error.add_note(f"rank: {rank()}")  # its last line
        raise
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def _refuse(message: str, status: int = 2) -> NoReturn:
    """Exit with an error of the command line."""
    if not is_main_process():  # all processes meet the same one, unless their hosts differ
        _tell_launcher(message)
    _exit(_with_rank(message), status)


def _exit(message: str, status: int = 2) -> NoReturn:
    """Print an error and exit."""
    print_error(message)
    raise SystemExit(status)


def _with_rank(message: str) -> str:
    """A message with the number of the process in front, on all processes but the first."""
    own = "" if is_main_process() else f"rank {rank()}: "
    return own + message.removeprefix(own)


def _failures() -> Any:
    """The module that tells the other processes; None without them, and before they have met."""
    return sys.modules.get("rlhf.failures") if num_processes() > 1 else None


def _tell_launcher(text: str) -> None:
    """Give torchrun or accelerate launch the text of an error. Their last lines name the rank that
    failed first, and show its text."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        extra = {"py_callstack": hide(text), "timestamp": str(int(time.time()))}
        content = {"message": {"message": hide(text), "extraInfo": extra}}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def _as_dataclass(node: Any, config_class: type[StageConfig]) -> StageConfig:
    written = OmegaConf.to_container(node)
    # merge again: "+key=value" adds a key that the schema does not have
    values = OmegaConf.merge(schema(config_class), written)
    config = OmegaConf.to_object(values)
    assert isinstance(config, config_class)
    remember_references(written, OmegaConf.to_container(values, resolve=True))
    return config


def _require_typed_trust(config: StageConfig, typed: list[str]) -> None:
    """Refuse permission to run a model's own code if a file gives it, such as a recipe."""
    is_typed = any(o.lstrip("+").startswith("model.trust_remote_code=") for o in typed)
    if config.model.trust_remote_code and not is_typed:
        raise InputError(
            "model.trust_remote_code=true comes from a file; only the command line may set it: "
            "add model.trust_remote_code=true there, or set it to false in the file"
        )


def _continued(config: StageConfig, stage: str, typed: list[str]) -> StageConfig:
    """Apply the command line to the configuration that the run was started with."""
    file = config_file_of_run(config.stage_dir(stage))
    if file is None:
        if config.resume is True:
            raise nothing_to_resume(config, stage)
        return config
    continued = compose_over(read_run_config(file, config), stage, typed)
    same = {key: getattr(config, key) for key in ("run_name", "runs_dir", "resume", "overwrite")}
    return dataclasses.replace(continued, **same)


def compose_over(values: dict[str, Any], stage: str, overrides: list[str]) -> Any:
    """Compose a stage's configuration with these values in place of the defaults.

    Groups and recipes among the overrides change only the keys that they set.
    """
    from hydra import compose
    from hydra.core.config_store import ConfigStore

    config_class, store = STAGES[stage], ConfigStore.instance()
    groups: list[Any] = [{group: None} for group in groups_of(config_class)]
    defaults = [f"{stage}_schema", "_self_", *groups, {"recipe": None}, {"stage": stage}]
    store.store(name=f"{stage}_schema", node=schema(config_class))
    store.store(name=f"{stage}_over", node={"defaults": defaults} | values)
    # "+key=value" fails on a key that exists, and the values may have it already
    overrides = [re.sub(r"^\+(?!\+)", "++", o) for o in overrides]
    return _as_dataclass(compose(f"{stage}_over", overrides), config_class)


def hydra_arguments(given: list[str]) -> list[str]:
    """The arguments that Hydra gets for those that were given.

    Options come before overrides, because argparse refuses overrides on both sides of an option.
    `recipe=demo` is added when there is nothing to do but the demo. `recipe=null` is dropped: it
    is the default, but Hydra refuses null for a group.
    """
    options, overrides = _split_options(given)
    if runs_demo(given):
        overrides = ["recipe=demo"]
    return options + [override for override in overrides if override != "recipe=null"]


def runs_demo(arguments: list[str]) -> bool:
    """True without overrides, and without options other than those that only print."""
    options, overrides = _split_options(arguments)
    names = {option.partition("=")[0] for option in options if option.startswith("-")}
    return not overrides and names <= PRINTING


def _split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and overrides."""
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_option = argument.startswith("-") or before in VALUED
        (options if is_option else overrides).append(argument)
    return options, overrides


def explain_hydra(error: Exception, config_class: type) -> str:
    """Say in one line what Hydra refuses; Hydra's own text lists search paths and links."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if f"{group}={name}".startswith(SUBMITS):
            return f"{group}={name} needs hydra-submitit-launcher: pip install 'rlhf[slurm]'"
        if group == "recipe/parts":  # conf/recipe/parts/<recipe>_<stage>.yaml
            recipe, _, stage = name.rpartition("_")
            has = ", ".join(sorted(s for s in STAGES if f"{recipe}_{s}" in error.options))
            return (
                f"recipe={recipe} has no {stage} stage (it has {has}); to start from its result, "
                f"use run_name={recipe} without a recipe"
            )
        return f"{group}={name} does not exist; choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return unreadable(str(error.override), error.message)
    file = re.match("In '(.+?)': ", str(error))  # the YAML file with the error, if any
    prefix = file.group() if file else ""
    return prefix + explain(error, config_class).removeprefix(prefix)


def name_sweep_run(config: StageConfig, swept: list[str], typed: list[str]) -> None:
    """Give each job of a sweep its own run name, unless the sweep names the runs itself.

    A job whose run has no earlier stages starts from those of the run that the sweep names.
    """
    if not swept or "run_name" in swept:
        return
    theirs = default_paths(config)
    config.run_name = job_name(config.run_name, swept, typed)
    for key, own in default_paths(config).items():
        if not own.is_dir() and theirs[key].is_dir():
            getattr(config, key.removesuffix(".path")).path = str(theirs[key])
