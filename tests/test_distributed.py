"""The files of conf/accelerate/, and what a launcher may not ask for. Sharded training itself is in
tests/end_to_end/test_sharded.py.

Run: python -m pytest tests/test_distributed.py
"""

import os
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from trl import SFTConfig

import rlhf.distributed
from rlhf.config import CONF_DIR, InputError, PPOStageConfig, SFTStageConfig, read_yaml
from rlhf.distributed import join_processes, launch_environment, refuse_zero3
from rlhf.hf_trainer import trainer_arguments
from rlhf.ppo.stage import refuse_here

FILES = sorted((CONF_DIR / "accelerate").glob("*.yaml"))
SAID = ("ACCELERATE_USE_FSDP", "FSDP_")


def told(file):
    """What accelerate launch tells the processes of a file about sharding."""
    given = ["--config_file", str(file), "--main_process_port", "0", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(SAID)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_every_launch_file(file):
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert config.num_processes >= 2 and not config.use_cpu
    assert config.mixed_precision == "no", "the stage decides"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_torchrun_with_distributed_shards_as_accelerate_launch_does(name, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    launched = told(CONF_DIR / "accelerate" / f"{name}.yaml")
    ours = launch_environment(name)
    assert ours.items() <= launched.items()
    assert ours["FSDP_VERSION"] == "2"
    assert ours["FSDP_OFFLOAD_PARAMS"] == str(name == "fsdp2_offload").lower()
    assert ours["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_deepspeed_itself_reads_the_zero2_file():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = read_yaml(CONF_DIR / "accelerate" / "zero2.yaml")["deepspeed_config"]
    values = DeepSpeedPlugin(**settings).deepspeed_config
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    rest = {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    parsed = DeepSpeedConfig(values | batch | rest)
    assert parsed.zero_config.stage == 2 and parsed.zero_enabled
    assert parsed.zero_config.offload_optimizer.device == "none"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_zero3_is_refused_by_name(stage):
    refuse_zero3(None, stage)
    refuse_zero3(SimpleNamespace(zero_stage=2), stage)
    with pytest.raises(InputError, match=f"^zero_stage: 3: .* that {stage} checks, .*fsdp2.yaml"):
        refuse_zero3(SimpleNamespace(zero_stage=3), stage)


def as_launched(monkeypatch, kind, **variables):
    """Be one of two processes, in a group that accelerate calls `kind`."""
    for name in [name for name in os.environ if name.startswith(SAID)]:
        monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    group = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(rlhf.distributed, "PartialState", lambda **_: group)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_accelerate_leaves_out_on_a_cpu_is_refused(name, monkeypatch):
    variables = {f"ACCELERATE_USE_{name}": "true", "FSDP_VERSION": "2"}
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
    with pytest.raises(InputError) as caught:
        refuse_here(config)
    assert str(caught.value).startswith(
        "compile=true, critic.share_trunk=true: not supported under FSDP yet; leave them "
        "out, or start without sharding: accelerate launch"
    )
    with pytest.raises(InputError, match="^micro_batch_tokens=64: not supported under FSDP yet"):
        trainer_arguments(SFTConfig, SFTStageConfig(micro_batch_tokens=64), "sft")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    refuse_here(config)
