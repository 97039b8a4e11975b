"""The files of conf/accelerate/, and what a launcher may not ask for. Sharded training itself is in
tests/end_to_end/test_sharded.py.

Run: python -m pytest tests/test_distributed.py
"""

import os
import sys
import time
from contextlib import contextmanager
from subprocess import PIPE, Popen
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import TrainingArguments
from trl import SFTConfig

import rlhf.distributed
import rlhf.sharding_settings
from rlhf import cpu_adam
from rlhf.config import (
    CONF_DIR,
    InputError,
    ModelConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    read_yaml,
)
from rlhf.cpu_adam import wait_for_build
from rlhf.distributed import ZERO, join_processes, launch_environment
from rlhf.hf_trainer import trainer_arguments
from rlhf.ppo.stage import refuse_here
from rlhf.sharding_settings import refuse_under_deepspeed

FILES = sorted((CONF_DIR / "accelerate").glob("*.yaml"))
SAID = ("ACCELERATE_", "FSDP_")


def told(name):
    """What accelerate launch tells the processes of a file about sharding."""
    file = str(CONF_DIR / "accelerate" / f"{name}.yaml")
    given = ["--config_file", file, "--main_process_port", "0", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    args.deepspeed_fields_from_accelerate_config = ""
    said = prepare_deepspeed_cmd_env(args)[1] if name in ZERO else prepare_multi_gpu_env(args)
    return {k: v for k, v in said.items() if k.startswith(SAID)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_every_launch_file(file):
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert config.num_processes >= 2 and not config.use_cpu
    assert config.mixed_precision == "no", "the stage decides"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_torchrun_with_distributed_shards_as_accelerate_launch_does(name, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    launched = told(name)
    ours = launch_environment(name)
    assert ours.items() <= launched.items()
    assert ours["FSDP_VERSION"] == "2"
    assert ours["FSDP_OFFLOAD_PARAMS"] == str(name == "fsdp2_offload").lower()
    assert ours["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("name", ZERO)
def test_torchrun_with_distributed_uses_deepspeed_as_accelerate_launch_does(name, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    launched = told(name)
    ours = launch_environment(name)
    assert len(ours) == 5 and ours.items() <= launched.items()


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_itself_reads_its_files(name):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = read_yaml(CONF_DIR / "accelerate" / f"{name}.yaml")["deepspeed_config"]
    values = DeepSpeedPlugin(**settings).deepspeed_config
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    rest = {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    parsed = DeepSpeedConfig(values | batch | rest)
    assert parsed.zero_config.stage == (2 if name == "zero2" else 3) and parsed.zero_enabled
    place = "cpu" if name == "zero3_offload" else "none"
    assert parsed.zero_config.offload_optimizer.device == place
    assert parsed.zero_config.offload_param.device == place


@pytest.mark.parametrize("name", ZERO)
def test_what_accelerate_says_of_our_files_of_deepspeed_is_taken(name, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    said = told(name)
    assert said["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == ("2" if name == "zero2" else "3")
    monkeypatch.setattr(rlhf.sharding_settings, "build_adam", lambda: None)
    autos = {
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    }
    for more in ({}, autos):
        as_launched(monkeypatch, DistributedType.DEEPSPEED, **(said | more))
        for config in (SFTStageConfig(), PPOStageConfig()):
            refuse_under_deepspeed(config)


def under_deepspeed(monkeypatch, **said):
    """Be one of two processes that accelerate launch told to use DeepSpeed."""
    as_launched(monkeypatch, DistributedType.DEEPSPEED, ACCELERATE_USE_DEEPSPEED="true", **said)


@pytest.mark.parametrize(
    "variable, value, problem",
    [
        ("CONFIG_FILE", "zero.json", "deepspeed_config_file: zero.json .*; write its settings as"),
        ("ZERO_STAGE", "1", "zero_stage: 1 .*; set it to 2 or 3"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "nvme", "offload_optimizer_device: nvme .*; set it to cpu or"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: nvme .*; set it to cpu or none"),
        ("OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device: cpu needs zero_stage: 3"),
    ],
)
def test_settings_of_deepspeed_that_no_stage_takes(variable, value, problem, monkeypatch):
    under_deepspeed(monkeypatch, **{f"ACCELERATE_DEEPSPEED_{variable}": value})
    with pytest.raises(InputError, match=f"^{problem}"):
        refuse_under_deepspeed(SFTStageConfig())


def test_settings_that_a_stage_decides_itself_are_refused_in_the_file(monkeypatch):
    said = {"GRADIENT_CLIPPING": "0.5", "GRADIENT_ACCUMULATION_STEPS": "4"}
    said = {f"ACCELERATE_{k}": v for k, v in (said | {"MIXED_PRECISION": "bf16"}).items()}
    under_deepspeed(monkeypatch, **said)
    with pytest.raises(InputError) as caught:
        refuse_under_deepspeed(SFTStageConfig())
    clipping, accumulation, precision = str(caught.value).splitlines()
    assert clipping.startswith("gradient_clipping: 0.5") and "trainer.max_grad_norm" in clipping
    assert accumulation.endswith("and set batch_size") and precision.endswith("and set precision")
    with pytest.raises(InputError) as caught:
        refuse_here(PPOStageConfig())
    clipping, accumulation, _ = str(caught.value).splitlines()
    assert clipping.endswith("set ppo.max_grad_norm")
    assert accumulation.endswith("set ppo.batch_size")


def test_settings_that_deepspeed_excludes_get_one_line_each(monkeypatch):
    config = SFTStageConfig(trainer={"optim": "adamw_bnb_8bit", "fp16": True})
    config.model.dtype = "bfloat16"
    refuse_under_deepspeed(config)  # without DeepSpeed
    under_deepspeed(monkeypatch)
    with pytest.raises(InputError) as caught:
        refuse_under_deepspeed(config)
    optimiser, scaler, dtype = str(caught.value).splitlines()
    assert optimiser.startswith("trainer.optim=adamw_bnb_8bit: ")
    assert optimiser.endswith("set trainer.optim=adamw_torch")
    assert scaler.startswith("trainer.fp16=true is not supported under DeepSpeed")
    assert dtype.startswith("model.dtype=bfloat16: ") and "set model.dtype=float32" in dtype
    refuse_under_deepspeed(SFTStageConfig(trainer={"optim": "adamw_torch_fused"}))
    with pytest.raises(InputError, match="^model.dtype=bfloat16: under DeepSpeed"):
        trainer_arguments(SFTConfig, SFTStageConfig(model=config.model), "sft")
    for setting in ({"micro_batch_tokens": 64}, {"trainer": {"load_best_model_at_end": True}}):
        with pytest.raises(InputError, match="not supported under DeepSpeed yet"):
            trainer_arguments(SFTConfig, SFTStageConfig(**setting), "sft")


def test_an_adam_that_cannot_be_built_is_refused_before_anything_loads(
    monkeypatch, capsys, tmp_path
):
    class Broken:
        NAME = "cpu_adam"

        def load(self, verbose):
            raise RuntimeError("no g++")

    builders = SimpleNamespace(CPUAdamBuilder=Broken)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)
    under_deepspeed(monkeypatch, ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="none")
    refuse_under_deepspeed(SFTStageConfig())
    under_deepspeed(monkeypatch, ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    with pytest.raises(InputError, match="^offload_optimizer_device: cpu: .*no g.*; install g"):
        refuse_under_deepspeed(SFTStageConfig())
    assert not capsys.readouterr().out
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setattr(cpu_adam, "time", Looks(lock, end=3))
    with pytest.raises(InputError, match=f"^{lock} is from a build .* that was killed.*delete it$"):
        refuse_under_deepspeed(SFTStageConfig())


# --- A build that another process has begun -------------------------------------------------------


class Looks:
    """The time of one who waits for a build: it passes when he sleeps."""

    def __init__(self, lock, end, written=0):
        """Of his looks, `end` sees the lock last, and `written` a file that has just changed."""
        self.lock, self.end, self.written = lock, end, written
        self.now, self.number = time.time(), 1

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.number += 1
        if self.number <= self.written:
            os.utime(self.lock.parent / "cpu_adam.o", (self.now,) * 2)
        if self.number > self.end:
            self.lock.unlink()


@pytest.fixture
def build(tmp_path):
    """The folder of a build that was begun an hour ago."""
    for name in ("lock", "cpu_adam.o"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    return tmp_path


@contextmanager
def opened(file):
    """Inside the block, another process has a file open."""
    command = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with Popen([sys.executable, "-c", command, file], stdin=PIPE, stdout=PIPE) as process:
        process.stdout.readline()
        yield


def test_a_killed_build_ends_the_stage_and_names_its_lock(build, monkeypatch):
    monkeypatch.setattr(cpu_adam, "time", Looks(build / "lock", end=3))
    with pytest.raises(InputError, match=r"changed for 60 minutes, and no process .*; delete it$"):
        wait_for_build(build / "lock")
    (build / "lock").unlink()
    wait_for_build(build / "lock")


def test_a_build_of_a_living_process_is_waited_for_however_slow(build, monkeypatch, capsys):
    looks = Looks(build / "lock", end=3)
    monkeypatch.setattr(cpu_adam, "time", looks)
    with opened(build / "lock"):
        wait_for_build(build / "lock")
    assert looks.number == 4
    said = capsys.readouterr().out
    assert said.count("waiting for the process that builds") == 1 and str(build / "lock") in said


def test_a_build_whose_files_change_is_waited_for_until_they_do_not(build, monkeypatch):
    monkeypatch.setattr(cpu_adam, "DEAD_SECONDS", 2.5)
    looks = Looks(build / "lock", end=20, written=5)
    os.utime(build / "cpu_adam.o", (looks.now,) * 2)
    monkeypatch.setattr(cpu_adam, "time", looks)
    with pytest.raises(InputError, match="delete it$"):
        wait_for_build(build / "lock")
    assert looks.number == 8, "the third after the last change"


def test_a_build_that_ends_while_it_is_looked_at_was_not_killed(build, monkeypatch):
    def is_open(lock):
        lock.unlink()
        return False

    monkeypatch.setattr(cpu_adam, "_is_open", is_open)
    wait_for_build(build / "lock")


def test_a_file_that_a_process_closes_does_not_hide_the_others_that_it_has_open(build, monkeypatch):
    def readlink(entry):
        if os.path.basename(entry) == "0":
            raise FileNotFoundError
        return original(entry)

    original = os.readlink
    with opened(build / "lock"), monkeypatch.context() as patch:
        patch.setattr(os, "readlink", readlink)
        assert cpu_adam._is_open(build / "lock")


def as_launched(monkeypatch, kind, **variables):
    """Be one of two processes, in a group that accelerate calls `kind`."""
    for name in [name for name in os.environ if name.startswith(SAID)]:
        monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    group = SimpleNamespace(distributed_type=kind)
    made = Mock(return_value=group, _shared_state=vars(group))
    monkeypatch.setattr(rlhf.distributed, "PartialState", made)
    return group


def test_deepspeed_is_used_on_a_cpu_where_accelerate_leaves_it_out(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    said = {"ACCELERATE_USE_DEEPSPEED": "true"}
    group = as_launched(monkeypatch, DistributedType.MULTI_CPU, **said)
    monkeypatch.setattr(rlhf.distributed, "find_spec", lambda name: name)
    join_processes()
    assert group.distributed_type == DistributedType.DEEPSPEED
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    group = as_launched(monkeypatch, DistributedType.MULTI_CPU)
    join_processes()
    assert group.distributed_type == DistributedType.MULTI_CPU


@pytest.mark.parametrize("launch, asked", [("zero3", "FSDP"), ("fsdp2", "DeepSpeed")])
def test_a_launcher_and_distributed_that_shard_otherwise_are_refused(launch, asked, monkeypatch):
    said = {f"ACCELERATE_USE_{asked.upper()}": "true"}
    as_launched(monkeypatch, DistributedType.MULTI_GPU, **said)
    with pytest.raises(InputError, match=f"^distributed={launch}: the launcher asks for {asked}"):
        join_processes(launch)


def test_without_the_package_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(rlhf.distributed, "find_spec", lambda name: None)
    as_launched(monkeypatch, DistributedType.MULTI_CPU)
    with pytest.raises(InputError, match="^distributed=zero3 needs a package: pip install 'rlhf"):
        join_processes("zero3")
    as_launched(monkeypatch, DistributedType.MULTI_CPU, ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(InputError, match="^the launcher asks for DeepSpeed, which needs"):
        join_processes()


def test_sharding_that_accelerate_leaves_out_on_a_cpu_is_refused(monkeypatch):
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    as_launched(monkeypatch, DistributedType.MULTI_CPU, **variables)
    with pytest.raises(InputError, match="shards over GPUs, but these 2 processes are on the CPU"):
        join_processes()
    as_launched(monkeypatch, DistributedType.MULTI_GPU, **variables)
    join_processes()


def test_processes_without_sharding_train_on_a_cpu(monkeypatch):
    as_launched(monkeypatch, DistributedType.MULTI_CPU)
    join_processes()


def test_first_version_of_fsdp_is_refused(monkeypatch):
    as_launched(monkeypatch, DistributedType.MULTI_GPU, ACCELERATE_USE_FSDP="true")
    with pytest.raises(InputError, match="fsdp_version: 1 is not supported"):
        join_processes()


def test_loading_on_the_first_process_alone_is_switched_off(monkeypatch, capsys):
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    as_launched(monkeypatch, DistributedType.MULTI_GPU, **variables)
    join_processes()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert "each process checks the weights that it loads" in capsys.readouterr().out


def test_sharding_needs_several_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="distributed=fsdp2 shards .* torchrun --nproc-per-node"):
        join_processes("fsdp2")


def test_what_sharded_training_does_not_do_is_refused(monkeypatch):
    as_launched(monkeypatch, DistributedType.MULTI_GPU, ACCELERATE_USE_FSDP="true")
    config = PPOStageConfig()
    config.critic.share_trunk = config.compile = True
    config.model.quantization = "4bit"
    with pytest.raises(InputError) as caught:
        refuse_here(config)
    assert str(caught.value).startswith(
        "compile=true, critic.share_trunk=true, model.quantization=4bit: not supported under FSDP "
        "yet; leave them "
        "out, or start without sharding: accelerate launch"
    )
    with pytest.raises(InputError, match="^micro_batch_tokens=64: not supported under FSDP yet"):
        trainer_arguments(SFTConfig, SFTStageConfig(micro_batch_tokens=64), "sft")
    with pytest.raises(InputError, match="^model.quantization=4bit: not supported under FSDP yet"):
        trainer_arguments(SFTConfig, SFTStageConfig(model=config.model), "sft")
    with pytest.raises(InputError, match="^trainer.optim=adafactor: not supported under FSDP yet"):
        trainer_arguments(SFTConfig, SFTStageConfig(trainer={"optim": "adafactor"}), "sft")
    model = ModelConfig(dtype="bfloat16")
    with pytest.raises(InputError, match="^model.dtype=bfloat16: not supported under FSDP yet"):
        trainer_arguments(TrainingArguments, RewardStageConfig(model=model), "reward")
    with pytest.raises(InputError, match="^model.dtype=bfloat16: not supported under FSDP yet"):
        refuse_here(PPOStageConfig(model=model))
    refuse_here(PPOStageConfig(model=model, peft=PeftConfig(enabled=True)))
    refuse_here(PPOStageConfig(model=model, ppo=PPOConfig(advantage="rloo")))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    refuse_here(config)
