"""What reaches Slurm: the batch script, jobs that Hydra's launcher submits, and the tasks of srun.
No test has a Slurm: srun and scontrol are scripts here.

Run: python -m pytest tests/commands/test_slurm.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from rlhf.cli import explain_hydra, hydra_main
from rlhf.config import SFTStageConfig
from rlhf.slurm import first_host, group_of_tasks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/clusters/slurm.sbatch"
SLURM = "hydra/launcher=submitit_slurm"
TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def program(folder, name, text):
    """A program of this name; what the folder's programs are called with is in calls.txt."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls.txt\n{text}\n')
    (folder / name).chmod(0o755)


# --- srun -----------------------------------------------------------------------------------------


def test_tasks_of_srun_are_the_processes_of_a_run():
    group = group_of_tasks(TASK)
    assert (group["RANK"], group["WORLD_SIZE"], group["LOCAL_RANK"]) == ("9", "16", "1")
    assert (group["MASTER_ADDR"], group["MASTER_PORT"]) == ("gpu003", "18456")


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0", "WORLD_SIZE": "8"},  # srun torchrun ...
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks 1 python ...
    ],
)
def test_other_launchers_and_single_tasks_are_left_alone(change):
    assert group_of_tasks(TASK | change) == {}


def test_a_batch_script_without_srun_is_one_process():
    script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert group_of_tasks(script) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("rack2-gpu[7]-ib,cpu[1-2]", "rack2-gpu7-ib"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[05-08]", "r1n05"),
    ],
)
def test_the_first_host_of_a_list_of_nodes_leads(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.slow
def test_two_tasks_train_one_model_together(tmp_path):
    step = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    step |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    given = "-m rlhf.sft recipe=demo run_name=two resume=auto trainer.max_steps=2 num_samples=0"
    tasks = [
        subprocess.Popen(
            [sys.executable, *given.split()],
            cwd=tmp_path,
            env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [task.communicate(timeout=500)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 processes" in said[0] and "saved" not in said[1]
    assert (tmp_path / "runs/two/sft/final/model.safetensors").is_file()


# --- The batch script -----------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path):
    """Run the batch script with an srun that ends with a status: (its status, what was called)."""

    def run(status, *args):
        programs = tmp_path / "bin"
        program(programs, "srun", f"exit {status}")
        program(programs, "scontrol", "")
        variables = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
        done = subprocess.run([SCRIPT, *args], env=os.environ | variables, cwd=tmp_path)
        return done.returncode, (programs / "calls.txt").read_text().splitlines()

    SCRIPT.chmod(0o755)
    return run


def test_the_batch_script_starts_a_stage_that_continues_a_run(submitted, tmp_path, monkeypatch):
    status, calls = submitted(0, "rlhf.sft", "run_name=a b", "recipe=demo")
    assert status == 0
    assert calls == [
        "srun --kill-on-bad-exit=1 .venv/bin/python -m rlhf.sft resume=auto "
        "checkpoint.grace_seconds=150 run_name=a b recipe=demo"
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf.sft", *calls[0].split()[5:7], "recipe=demo"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    seen = []
    hydra_main("sft", seen.append)
    assert (seen[0].resume, seen[0].checkpoint.grace_seconds) == ("auto", 150)


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False), (2, False), (1, False)])
def test_the_batch_script_requeues_what_sigterm_stopped_and_nothing_else(
    status, requeued, submitted
):
    ended, calls = submitted(status, "rlhf.sft")
    assert ended == status
    assert calls[1:] == (["scontrol requeue 77"] if requeued else [])


def test_the_batch_script_leaves_time_to_save():
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH ")
    )
    assert options["signal"] == "TERM@180"  # to the tasks; B:TERM@180 would end the script alone
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options and options["open-mode"] == "append"


# --- Hydra's launcher -----------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """Type a stage's command: (exit status, what would be submitted, stdout, stderr)."""
    pytest.importorskip("submitit", reason="pip install 'rlhf[slurm]'")
    import submitit
    from cloudpickle import dumps

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest
    program(tmp_path / "bin", "srun", "")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    submitted = []

    def map_array(executor, function, *arguments):
        dumps((function, arguments))  # as the job will get them
        jobs = [list(overrides) for overrides in arguments[0]]
        submitted.append((executor._executor._make_submission_file_text("srun", "x"), jobs))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)

    def run(stage, *args):
        monkeypatch.setattr("sys.argv", [f"rlhf.{stage}", *args])
        try:
            hydra_main(stage, lambda config: pytest.fail("the stage began here"))
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, submitted, *capfd.readouterr()

    return run


def test_a_sweep_is_submitted_to_slurm(launch):
    resources = ["partition=gpu", "gpus_per_node=1", "cpus_per_task=8", "timeout_min=1440"]
    given = [f"hydra.launcher.{value}" for value in [*resources, "max_num_timeout=10"]]
    status, submitted, output, errors = launch(
        "sft", "-m", SLURM, *given, "recipe=demo", "resume=auto", "seed=1,2"
    )
    assert (status, errors) == (0, "")
    assert output == (
        f"{SLURM}: 2 jobs are submitted, and this command waits for them; their output is in "
        "runs/.submitit/<job>/\n"
    )
    ((script, jobs),) = submitted
    for option in ("partition=gpu", "gpus-per-node=1", "cpus-per-task=8", "time=1440"):
        assert f"#SBATCH --{option}\n" in script
    assert [job[-1] for job in jobs] == ["seed=1", "seed=2"]
    assert all("resume=auto" in job for job in jobs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recipe=demo"], f"{SLURM} submits the jobs of a sweep: add -m"),
        (["-m", "recipe=demo", "seed=1,1"], "2 jobs of the sweep have 1 names"),
        (["-m", "recipe=demo", "batch_sise=1"], "unknown key 'batch_sise'"),
        (["-m", "recipe=demo", "batch_size=4,0"], "batch_size must be >= 1, got 0"),
        (["-m", "recipe=demo", "hydra.launcher.gpu=1"], "gpu"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_submitted(args, message, launch):
    status, submitted, _, errors = launch("sft", SLURM, *args)
    assert (status, submitted) == (2, [])
    assert message in errors


def test_a_machine_without_slurm_submits_nothing(launch, tmp_path):
    (tmp_path / "bin/srun").unlink()
    status, submitted, _, errors = launch("sft", "-m", SLURM, "recipe=demo")
    assert (status, submitted) == (2, [])
    assert errors == (
        f"error: {SLURM}: this machine has no srun; submit where Slurm is installed, or try "
        "hydra/launcher=submitit_local here\n"
    )


def test_a_launcher_that_is_not_installed_is_named_with_its_extra():
    error = MissingConfigException("", "hydra/launcher/submitit_slurm", ["basic"])
    assert explain_hydra(error, SFTStageConfig) == (
        f"{SLURM} needs hydra-submitit-launcher: pip install 'rlhf[slurm]'"
    )
