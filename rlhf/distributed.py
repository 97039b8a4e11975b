"""What differs between one process and many: their group, and who holds which weights.

The errors of one of them are in `failures.py`.

Weights are sharded by PyTorch FSDP2, through accelerate. A parameter is then a `DTensor`:
each process holds a slice of it. DeepSpeed can do so too (`zero.py`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from rlhf.config import CONF_DIR, InputError, read_yaml
from rlhf.console import launched_with, num_processes, say
from rlhf.zero import Scattered, come_to_rest, gathered, is_engine, is_zero, own_numbers

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
ZERO = ("zero2", "zero3", "zero3_offload")  # files of DeepSpeed in conf/accelerate/


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
    """What `accelerate launch` would tell the processes of `conf/accelerate/<name>.yaml` about
    sharding."""
    content = read_yaml(CONF_DIR / "accelerate" / f"{name}.yaml")
    kind, prefix = ("DEEPSPEED", "ACCELERATE_DEEPSPEED_") if name in ZERO else ("FSDP", "")
    settings = content[f"{kind.lower()}_config"]
    values = {
        f"{prefix}{key.upper().removesuffix('_FLAG')}": str(value)
        for key, value in settings.items()
    }
    values = {k: v.lower() if v in ("True", "False") else v for k, v in values.items()}
    return {f"ACCELERATE_USE_{kind}": "true"} | values


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
    _ask_for(launch)
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
    if sharding() == "DeepSpeed":  # it calls collectives of torch by their old names (0.19.8)
        old = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", old, FutureWarning)
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


def _ask_for(launch: str | None) -> None:
    """Tell this process what `accelerate launch` would, if `distributed` asks for it."""
    if launch is not None:
        if num_processes() == 1:
            raise InputError(
                f"distributed={launch} shards a model over several processes, but there is one; "
                "start them with torchrun --nproc-per-node <GPUs> -m rlhf.<stage> ..., or set "
                "distributed=null"
            )
        if (asked := sharding()) not in (None, "DeepSpeed" if launch in ZERO else "FSDP"):
            raise InputError(
                f"distributed={launch}: the launcher asks for {asked} already; leave it out, or "
                "start the stage with torchrun, which asks for nothing"
            )
    if (launch in ZERO or sharding() == "DeepSpeed") and find_spec("deepspeed") is None:
        where = f"distributed={launch}" if launch else "the launcher asks for DeepSpeed, which"
        raise InputError(f"{where} needs a package: pip install 'rlhf[deepspeed]', or take FSDP2")
    if launch is not None:
        os.environ.update(launch_environment(launch))


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
        InputError: one of several processes was on a different device before.
    """
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
    with _plain_processes():
        return Accelerator(cpu=cpu, mixed_precision="bf16" if use_bfloat16(precision) else "no")


@contextmanager
def _plain_processes() -> Iterator[None]:
    """Hide DeepSpeed from accelerate inside the block: accelerate steps at the end of each backward
    pass, and PPO has engines of its own (`share`)."""
    if sharding() != "DeepSpeed":
        yield
        return
    several = DistributedType.MULTI_GPU if torch.cuda.is_available() else DistributedType.MULTI_CPU
    kind = several if num_processes() > 1 else DistributedType.NO
    PartialState._shared_state["distributed_type"] = kind
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    try:
        yield
    finally:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


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


@contextmanager
def ending_in_slices(model: nn.Module) -> Iterator[None]:
    """Have FSDP2 drop what it has gathered of a model at the end of the block; after a pass that
    fails half way, it keeps that in place of the slices."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def offloads() -> bool:
    """True if the launcher asks that slices wait in main memory."""
    if sharding() == "DeepSpeed":
        return os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE") == "cpu"
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def share(model: Any, accelerator: Accelerator) -> Any:
    """Let all processes train a model together: with DDP, or in the slices that they have. Under
    DeepSpeed, `zero.make_engine` comes next."""
    if sharding() is None:
        return accelerator.prepare_model(model)
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.auto_wrap_policy = None  # it would look for units again
    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def backward(model: Any, loss: Tensor, accelerator: Accelerator) -> None:
    """Add up the gradients of a model that `share`, or DeepSpeed, has wrapped."""
    if is_engine(model):
        model.backward(loss, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


def syncing(model: Any, syncs: bool, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The context of a pass that exchanges the gradients of the processes, or not. Models in slices
    always do, because a process has no room for the gradients of whole weights; DeepSpeed is told
    which pass is the last of a step."""
    if is_engine(model):
        model.set_gradient_accumulation_boundary(syncs)
    if syncs or is_engine(model) or is_sharded(model):
        return nullcontext()
    return accelerator.no_sync(model)


def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, accelerator: Accelerator
) -> float:
    """Scale the gradients of a model so that their norm, over all slices, is at most `limit`;
    return the norm before. DeepSpeed's optimiser does so itself: `zero.SlicedOptimizer`."""
    parameters = list(parameters)
    if sharding() is None:
        return float(accelerator.clip_grad_norm_(parameters, limit))
    _average_whole_gradients(parameters, accelerator)
    return float(whole(clip_grad_norm_(parameters, limit)))


def _average_whole_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Give all processes the mean of the gradients of what is not in slices: adapters and heads on
    one base."""
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
    if sharding() is None:
        return None
    name = "FSDP2"
    if sharding() == "DeepSpeed":
        name = f"DeepSpeed ZeRO-{zero_stage()}"
        what = what if zero_stage() == 3 else "gradients and optimiser"
    return f"{name}, {what} in slices over {accelerator.num_processes} processes{rest}"


def is_sharded(model: nn.Module) -> bool:
    """True if this process holds only slices of the model's weights."""
    return any(isinstance(p, DTensor) or is_zero(p) for p in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if is_zero(tensor):
        return own_numbers(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def to_write(tensor: Any) -> Tensor:
    """What this process holds of a weight, so that it can be written to."""
    if is_zero(tensor):
        come_to_rest([tensor])
    return local(detached(tensor))


def compute_device(model: nn.Module) -> torch.device:
    """Where a model's passes run; slices of it may wait elsewhere."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if is_zero(parameter):
        return torch.device(default_device())
    return parameter.device if parameter.device.type != "meta" else torch.device("cpu")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is in slices on the processes; all of them must ask."""
    if is_zero(tensor):
        return gathered(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor | Scattered) else tensor


def detached(tensor: Tensor) -> Tensor:
    """A tensor without its graph; DeepSpeed's slices stay with the weight that knows them."""
    return tensor if is_zero(tensor) else tensor.detach()
