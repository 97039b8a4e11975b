"""What differs between one process and many: their group, and who holds which weights.

The errors of one of them are in `failures.py`.

Weights are sharded by PyTorch FSDP2, through accelerate. A parameter is then a `DTensor`:
each process holds a slice of it. For SFT and reward, DeepSpeed can do so too (`zero.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from rlhf.config import CONF_DIR, InputError, read_yaml
from rlhf.console import launched_with, num_processes, say
from rlhf.zero import Scattered, gathered, is_zero, own_numbers, shape_of

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_bfloat16(precision: str) -> bool:
    """Decide whether forward passes run under bfloat16 autocast; "auto": if the GPU supports it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


# --- The group of processes -----------------------------------------------------------------------


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` would tell the processes of `conf/accelerate/<name>.yaml`, an FSDP
    file, about sharding."""
    settings = read_yaml(CONF_DIR / "accelerate" / f"{name}.yaml")["fsdp_config"]
    values = {key.upper(): str(value) for key, value in settings.items()}
    values = {k: v.lower() if v in ("True", "False") else v for k, v in values.items()}
    return {"ACCELERATE_USE_FSDP": "true"} | values


def sharding() -> str | None:
    """What the launcher asked to shard the weights with: "FSDP", "DeepSpeed" or None."""
    if launched_with("DeepSpeed"):  # which offloads with one process, too
        return "DeepSpeed"
    return "FSDP" if launched_with("FSDP") and num_processes() > 1 else None


def zero_stage() -> int:
    """The stage of DeepSpeed's ZeRO that the launcher asked for: 2 divides gradients and optimiser,
    3 the weights too. 0: no DeepSpeed."""
    if sharding() != "DeepSpeed":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def loads_in_slices() -> bool:
    """True if the launcher asks that each process holds slices of the weights."""
    return sharding() == "FSDP" or zero_stage() == 3


def join_processes(launch: str | None = None, timeout_seconds: float | None = None) -> None:
    """Join the group of the processes that a launcher started.

    Args:
        launch: a file of `conf/accelerate/`, for a launcher that says nothing about sharding.

    Raises:
        InputError: accelerate would leave out the sharding without a word, or there is only one
            process, or the processes shard in a way that no stage supports.
    """
    if launch is not None:
        if num_processes() == 1:
            raise InputError(
                f"distributed={launch} shards a model over several processes, but there is one; "
                "start them with torchrun --nproc-per-node <GPUs> -m rlhf.<stage> ..., or set "
                "distributed=null"
            )
        os.environ.update(launch_environment(launch))
    if sharding() == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "fsdp_version: 1 is not supported; set fsdp_version: 2 in the file of accelerate "
            f"launch, or take {CONF_DIR / 'accelerate' / 'fsdp2.yaml'}"
        )
    if sharding() == "FSDP":  # with another type, accelerate starts no gloo next to NCCL
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    if sharding() == "FSDP" and os.environ.get(RAM_EFFICIENT, "false").lower() == "true":
        say("fsdp_cpu_ram_efficient_loading: off; each process checks the weights that it loads")
        os.environ[RAM_EFFICIENT] = "false"
    limit: dict[str, Any] = {}
    if timeout_seconds is not None:
        limit["timeout"] = timedelta(seconds=timeout_seconds)
    state = PartialState(cpu=not torch.cuda.is_available(), **limit)
    use_deepspeed_on_cpu()
    if sharding() and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        why = "use_cpu: true" if torch.cuda.is_available() else "no GPU is visible"
        raise InputError(
            f"{sharding()} shards over GPUs, but these {num_processes()} processes are on the CPU "
            f"({why}), where accelerate leaves it out without a word; start on a machine with GPUs "
            "and with use_cpu: false, or without sharding: accelerate launch --multi_gpu "
            f"--num_processes {num_processes()} -m rlhf.<stage> ..."
        )


def use_deepspeed_on_cpu() -> None:
    """Let accelerate use DeepSpeed on a CPU, if the launcher asks for it: DeepSpeed runs there, but
    accelerate leaves it out. Needed again where a Trainer's arguments have made the group anew."""
    state = PartialState._shared_state
    if sharding() == "DeepSpeed" and state.get("distributed_type") == DistributedType.MULTI_CPU:
        os.environ["DS_ACCELERATOR"] = "cpu"
        state["distributed_type"] = DistributedType.DEEPSPEED


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator of a stage, also after other stages in the same process.

    accelerate keeps one state per process and refuses a different precision or device. The models
    of earlier stages no longer need it, so it is reset; the process group is kept.

    Raises:
        InputError: one of several processes was on a different device before, or PPO cannot shard
            as the launcher asks.
    """
    if sharding() == "DeepSpeed":
        raise InputError(
            "PPO does not run under DeepSpeed, which has one optimiser for one model; FSDP2 shards "
            "policy and critic in the same way: accelerate launch "
            f"--config_file {CONF_DIR / 'accelerate' / 'fsdp2.yaml'} -m rlhf.ppo ..."
        )
    cpu = not torch.cuda.is_available()
    state = PartialState._shared_state
    other_device = bool(state) and cpu != (state["device"].type == "cpu")
    if other_device and state["num_processes"] > 1:
        raise InputError(
            f"this process was in a group of {state['num_processes']} on {state['device']}, and a "
            f"stage on {'the CPU' if cpu else 'a GPU'} cannot join it; run that stage by itself"
        )
    AcceleratorState._reset_state(reset_partial_state=other_device)
    if state.get("distributed_type") == DistributedType.FSDP:  # else it gets no settings again
        state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(cpu=cpu, mixed_precision="bf16" if use_bfloat16(precision) else "no")


# --- Sharded weights ------------------------------------------------------------------------------


def slice_weights(model: Any, on_cpu: bool) -> None:
    """Let FSDP2 give each process a slice of every weight of a model, in place. Weights on the meta
    device stay there.

    The slices, and what is gathered of them, are float32, so that the numbers are those of one
    process; autocast rounds as it does there. What a pass gathers is dropped after it.

    Args:
        on_cpu: slices wait in main memory, where passes run on a GPU.
    """
    blocks = set(model._no_split_modules or ())
    units = [module for module in model.modules() if type(module).__name__ in blocks]
    offload = CPUOffloadPolicy(torch.cuda.is_available()) if on_cpu else OffloadPolicy()
    for unit in [*units, model]:
        fully_shard(unit, reshard_after_forward=True, offload_policy=offload)


def offloads() -> bool:
    """True if the launcher asks that slices wait in main memory."""
    if sharding() == "DeepSpeed":
        return os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE") == "cpu"
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def share(model: Any, accelerator: Accelerator) -> Any:
    """Let all processes train a model together: with DDP, or in the slices that they have."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model)
    accelerator.state.fsdp_plugin.auto_wrap_policy = None  # it would look for units again
    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, accelerator: Accelerator
) -> float:
    """Scale the gradients of a model so that their norm, over all slices, is at most `limit`;
    return the norm before."""
    parameters = list(parameters)
    if not accelerator.is_fsdp2:
        return float(accelerator.clip_grad_norm_(parameters, limit))
    _average_whole_gradients(parameters, accelerator)
    return float(whole(clip_grad_norm_(parameters, limit)))


def _average_whole_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Give all processes the mean of the gradients of what FSDP2 does not shard: adapters and heads
    on one base."""
    whole_ones = (p.grad for p in parameters if not isinstance(p, DTensor))
    gradients = [gradient for gradient in whole_ones if gradient is not None]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    mean = accelerator.reduce(together, reduction="mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to a device, in place; slices stay where they are."""
    model._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(device))


def describe_sharding(
    accelerator: Accelerator, what: str = "what trains", rest: str = ""
) -> str | None:
    """How the processes share weights, in words; None if each has all of them."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    name = "FSDP2"
    if not accelerator.is_fsdp2:
        name = f"DeepSpeed ZeRO-{zero_stage()}"
        what = what if zero_stage() == 3 else "gradients and optimiser"
    return f"{name}, {what} in slices over {accelerator.num_processes} processes{rest}"


def refuse_under_sharding(options: Mapping[str, Any]) -> None:
    """Refuse what sharded training does not do yet.

    Args:
        options: setting as it is typed -> whether it is set.
    """
    bad = [option for option, is_set in options.items() if is_set]
    if sharding() and bad:
        raise InputError(
            f"{', '.join(bad)}: not supported under {sharding()} yet; leave "
            f"{'it' if len(bad) == 1 else 'them'} out, or start without sharding: accelerate "
            f"launch --config_file {CONF_DIR / 'accelerate' / 'ddp.yaml'} -m rlhf.<stage> ..."
        )


def is_sharded(model: nn.Module) -> bool:
    """True if this process holds only slices of the model's weights."""
    return any(isinstance(p, DTensor) or is_zero(p) for p in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if is_zero(tensor):
        return own_numbers(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows of a tensor that this process holds.

    5 rows over 4 processes: 0 to 2, 2 to 4, 4 to 5, 5 to 5
    """
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    mesh = tensor.device_mesh
    each = -(-len(tensor) // mesh.size())
    first, end = (min(each * (mesh.get_local_rank() + i), len(tensor)) for i in (0, 1))
    return first, end


def read_rows(target: Tensor, stored: Any) -> None:
    """Copy this process's rows of a stored tensor, in place. Rows that a table has beyond those of
    its file are their mean.

    Args:
        target: a parameter, in slices or whole.
        stored: a tensor, or of `safe_open(...).get_slice`.
    """
    first, end = own_rows(target)
    mine = local(target)
    rows = len(stored) if isinstance(stored, Tensor) else stored.get_shape()[0]
    known = max(0, min(end, rows) - first)
    if known:
        mine[:known] = stored[first : first + known].to(mine)
    if known < end - first:
        mine[known:] = stored[:].to(mine).mean(dim=0)


def read_stored(file: Any, name: str, other: Tensor) -> Tensor:
    """A tensor in a safetensors file, or this process's slice of it, if `other` is a slice of a
    tensor of that shape.

    Args:
        file: of `safe_open`.
    """
    if not isinstance(other, DTensor) or [*other.shape] != file.get_slice(name).get_shape():
        return file.get_tensor(name)
    result = torch.empty_like(other)
    read_rows(result, file.get_slice(name))
    return result


def compute_device(model: nn.Module) -> torch.device:
    """Where a model's passes run; slices of it may wait elsewhere."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device if parameter.device.type != "meta" else torch.device("cpu")


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of the largest unit of a sharded model, whose weights are whole while it runs."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = {id(p) for unit in units if unit is not model for p in unit.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inner)
    sizes = [sum(p.nbytes for p in unit.parameters()) for unit in units if unit is not model]
    return max([rest, *sizes])


def sliced_bytes(model: nn.Module) -> int:
    """Bytes of the weights of a model that are in slices, all slices together: what each process
    gathers in a pass."""
    weights = [p for p in model.parameters() if isinstance(p, DTensor) or is_zero(p)]
    return sum(shape_of(weight).numel() * weight.itemsize for weight in weights)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is in slices on the processes; all of them must ask."""
    if is_zero(tensor):
        return gathered(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor | Scattered) else tensor


def detached(tensor: Tensor) -> Tensor:
    """A tensor without its graph; DeepSpeed's slices stay with the weight that knows them."""
    return tensor if is_zero(tensor) else tensor.detach()


def in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy of a tensor that takes no main memory: it is mapped from a file in a folder, which has
    no name and ends with the copy."""
    if not tensor.numel():
        return tensor.cpu()
    with TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here
        path, kind = f"/proc/self/fd/{file.fileno()}", tensor.dtype
        copy = torch.from_file(path, shared=True, size=tensor.numel(), dtype=kind)
    return copy.view(tensor.shape).copy_(tensor)


def load_optimizer(optimizer: Any, content: dict[str, Any]) -> None:
    """Give an optimiser a state with whole tensors; its weights may be in slices."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in content["state"].items():
        own = parameters[int(index)]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == own.shape:
                values[name] = like(value, own)
    optimizer.load_state_dict(content)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `other` is: whole, or this process's slice."""
    if not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
