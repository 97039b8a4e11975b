"""Weights and optimiser states that DeepSpeed keeps in slices: dividing, gathering, saving them.

Under ZeRO-2, each process has whole weights and a slice of the optimiser's states. Under ZeRO-3, a
weight is an empty tensor to everybody but DeepSpeed, and its slice is `ds_tensor`. SFT and reward
train by the Trainer's engine, PPO by an engine for each model. DeepSpeed is imported only in a run
that uses it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.console import is_main_process, num_processes, rank

FLAT = "fp32_partitioned_groups_flat"  # attribute of DeepSpeed's optimiser of ZeRO-3
ENGINE = "_rlhf_zero_engine"  # attribute of a model, and of its weights
# Of all engines. They know nothing about batches: the caller says which pass is the last of a step.
COMMON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
}


def is_zero(tensor: Any) -> bool:
    """True for a weight that DeepSpeed keeps in slices."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a weight, whole or in slices."""
    return getattr(tensor, "ds_shape", tensor.shape)


def own_numbers(weight: Any) -> Tensor:
    """This process's slice of a weight, (N,), without the padding at its end."""
    held = weight.ds_tensor
    left = weight.ds_numel - held.numel() * weight.ds_zero_partition_rank
    return held[: max(0, min(left, held.numel()))]


def like_weight(weight: Any) -> Tensor:
    """A copy of a weight, whole or in slices as that is."""
    if not is_zero(weight):
        return weight.detach().clone()
    copy = nn.Parameter(gathered(weight), requires_grad=False)
    divide_weights([copy], weight.ds_tensor.device.type == "cpu")
    return copy


def divide_weights(weights: Iterable[nn.Parameter], on_cpu: bool) -> None:
    """Give each process its slice of weights that all have whole, one after the other, in place.

    Args:
        on_cpu: slices wait in main memory.
    """
    from deepspeed import zero

    place = {"remote_device": "cpu" if on_cpu else None, "mem_efficient_linear": False}
    for weight in weights:
        if not is_zero(weight):
            zero.Init(module=nn.ParameterList([weight]), dtype=torch.float32, **place)


def come_to_rest(weights: Iterable[Any]) -> None:
    """Drop what passes have left of weights in slices: whole ones, since the end of a layer whose
    inputs have no gradients is hidden from DeepSpeed, and some on their way, for a next layer."""
    engines = {
        id(engine): engine
        for weight in weights
        if weight.ds_status.name != "NOT_AVAILABLE"
        and (engine := getattr(weight, ENGINE, None)) is not None
    }
    for engine in engines.values():
        engine.empty_partition_cache()


@contextmanager
def gathering(weights: Iterable[Any]) -> Iterator[None]:
    """Inside the block, weights are whole; all processes call this together."""
    divided = [weight for weight in weights if is_zero(weight)]
    if not divided:
        yield
        return
    from deepspeed import zero

    come_to_rest(divided)
    with zero.GatheredParameters(divided):
        yield


def gathered(weight: Any) -> Tensor:
    """A whole copy of a weight in slices; all processes call this together."""
    if weight.ds_status.name == "AVAILABLE":  # gathered at the moment
        return weight.detach().clone()
    with gathering([weight]):
        return weight.detach().clone()


@torch.no_grad()
def put(weight: Any, value: Tensor) -> None:
    """Give a weight the numbers of a whole tensor, which every process has, in place."""
    if not is_zero(weight):
        weight.copy_(value)
        return
    from deepspeed import zero

    come_to_rest([weight])
    with zero.GatheredParameters([weight], modifier_rank=0):
        if is_main_process():
            weight.copy_(value)


def save_slices(model: nn.Module) -> None:
    """Have the linear layers of a model in slices keep their weights as slices for the backward
    pass, in place. torch's own keep a view of the whole weight, and so the whole model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_zero(module.weight):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap(x, layer.weight, layer.bias)


def recomputed() -> tuple[Any, Any]:
    """Contexts of the passes over a block that gradient checkpointing runs again: torch 2.13 keeps
    the weights that do not train themselves for the backward pass, not what they are, and DeepSpeed
    empties them after each layer."""
    return nullcontext(), _keeping_values()


@contextmanager
def _keeping_values() -> Iterator[None]:
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: pack(x.detach()), unpack):
        yield


@contextmanager
def runnable(model: Any, on_cpu: bool) -> Iterator[None]:
    """Inside the block, a model whose weights are in slices can be run; a Trainer's engine, which
    does that later, needs an optimiser."""
    if not any(map(is_zero, model.parameters())):
        yield
        return
    make_runnable(model, on_cpu)
    try:
        yield
    finally:
        _end_engine(model)


def make_runnable(model: Any, on_cpu: bool, units: Iterable[nn.Module] = ()) -> None:
    """Let DeepSpeed gather the weights of a model, which are in slices, while it runs.

    Args:
        units: modules inside that gather all their weights together, not layer by layer.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    for unit in units:
        set_z3_leaf_module(unit, True)
    settings = COMMON | {"zero_optimization": _in_slices(model, on_cpu)}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    _link(model, engine)


def _link(model: Any, engine: Any) -> None:
    """Let weights know the engine that gathers them."""
    model.__dict__[ENGINE] = engine
    for weight in model.parameters():
        if is_zero(weight):
            setattr(weight, ENGINE, engine)


def _end_engine(model: Any) -> None:
    """Undo `make_runnable`."""
    if (engine := model.__dict__.pop(ENGINE, None)) is not None:
        engine.empty_partition_cache()
        engine.destroy()


def _in_slices(model: Any, on_cpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings of ZeRO-3. A weight is whole only while it is used, and at most one unit
    is gathered ahead; by default, DeepSpeed keeps a billion numbers."""
    unit = unit_numel(model)
    given = {"max_live_parameters": 2 * unit, "max_reuse_distance": 0, "prefetch_bucket_size": unit}
    given |= {"param_persistence_threshold": 0}
    place = {"offload_param": {"device": "cpu"}} if on_cpu else {}
    return {"stage": 3} | {f"stage3_{name}": value for name, value in given.items()} | place


def unit_numel(model: Any) -> int:
    """Numbers of the largest decoder block of a model, or of a larger weight outside of them."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    sizes = [sum(shape_of(p).numel() for p in block.parameters()) for block in blocks]
    return max(*sizes, *(shape_of(p).numel() for p in model.parameters()))


# --- Training -------------------------------------------------------------------------------------


def make_engine(model: Any, optimizer: Any, limit: float, on_cpu: bool) -> tuple[Any, Any]:
    """Let DeepSpeed train a model. Its engine runs as the model does, and `engine.backward`
    exchanges gradients and adds them up.

    Args:
        model: under ZeRO-3 its weights are in slices.
        optimizer: torch's, with what trains; not to be used any more.
        limit: largest norm of the gradients.
        on_cpu: slices of weights wait in main memory. Those of the optimiser do where the launcher
            asks for it.

    Returns:
        The engine, and the optimiser in its place.
    """
    import deepspeed
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    _end_engine(model)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    bucket = unit_numel(model)
    zero: dict[str, Any] = {"stage": 2, "allgather_bucket_size": bucket}
    if any(map(is_zero, model.parameters())):
        zero = _in_slices(model, on_cpu)
    zero["reduce_bucket_size"] = bucket  # by default 2 GB for each model
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        optimizer = map_pytorch_optim_to_deepspeed(optimizer)
    settings = COMMON | {"gradient_clipping": limit, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    _link(model, engine)
    return engine, SlicedOptimizer(engine.optimizer, weights)


def is_engine(model: Any) -> bool:
    """True for what `make_engine` returns."""
    return hasattr(model, "set_gradient_accumulation_boundary")


class SlicedOptimizer:
    """An optimiser of DeepSpeed's, each process with a slice of its states.

    Its tensors in a checkpoint have the names of torch's: "3.exp_avg" of the weight 3.

    Attributes:
        weights: what it trains, in the order of torch's optimiser.
    """

    def __init__(self, zero: Any, weights: list[Any]):
        """Take DeepSpeed's own optimiser, without accelerate's wrapper."""
        self._zero, self.weights = zero, weights
        self._stage3 = hasattr(zero, FLAT)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Of slices that are flat, on this process."""
        return self._zero.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self._inner.defaults

    @property
    def _inner(self) -> Any:
        """Torch's, or DeepSpeed's own on the CPU."""
        return self._zero.optimizer

    def norm(self) -> float:
        """The norm of the gradients of all processes, before `step` clips them; nan if one is not
        finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self._stage3:
            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            norm = self._zero.scaled_global_norm()
        return float(norm) if norm >= 0 else math.nan

    def step(self) -> None:
        self._zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, also those of passes that no step has followed."""
        self._zero.zero_grad(set_to_none=set_to_none)
        if not self._stage3:
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for kept in ("averaged_gradients", "all_grad_tensors"):
            gradients = getattr(self._zero, kept, {})
            gradients.update(dict.fromkeys(gradients))

    def written(self) -> dict[str, Any]:
        """Its states for a checkpoint, which all processes write together."""
        from deepspeed.utils import safe_get_full_optimizer_state as get

        found: dict[str, Any] = {}
        self._link_states()
        for key, value in next(iter(self.state.values()), {}).items():
            for index, weight in enumerate(self.weights):
                if isinstance(value, Tensor) and value.dim():
                    found[f"{index}.{key}"] = Scattered(weight, partial(get, weight, key))
                else:  # steps
                    found[f"{index}.{key}"] = torch.tensor(float(value))
        return found

    def put(self, names: Collection[str], read: Callable[[str, Any], Tensor]) -> None:
        """Take states from a checkpoint, before the first step and after the weights.

        Args:
            names: of the states; none if the model has made no step.
            read: name of a state, and its weight -> the whole tensor.
        """
        zero, third = self._zero, self._stage3
        zero.refresh_fp32_params()  # its copies of the weights, which are loaded already
        if not names:
            return
        steps = read("0.step", None)
        for numbers in getattr(zero, FLAT if third else "single_partition_of_fp32_groups"):
            states = {key: torch.zeros_like(numbers) for key in ("exp_avg", "exp_avg_sq")}
            counts = isinstance(self._inner, torch.optim.AdamW)
            step = steps.clone() if counts else int(steps)
            self._inner.state[numbers] = {"step": step} | states
        self._link_states()
        for index, weight in enumerate(self.weights):
            for key in ("exp_avg", "exp_avg_sq"):
                self._put_moment(weight, key, read(f"{index}.{key}", weight))

    def _link_states(self) -> None:
        """Let the weights of ZeRO-2 know their states. DeepSpeed does so after the step of the
        first group of weights, when the others have no states yet (0.19.8)."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

        zero = self._zero
        groups = getattr(zero, "bit16_groups", [])
        parts = getattr(zero, "single_partition_of_fp32_groups", [])
        for group, numbers in zip(groups, parts, strict=True):
            link(group, numbers, self._inner.state)

    def _put_moment(self, weight: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._stage3:
            safe_set_full_optimizer_state(weight, value, key)
            return
        each = weight.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, each * num_processes() - value.numel()))
        safe_set_local_optimizer_state(weight, padded[each * rank() :][:each], key)


# --- Checkpoints ----------------------------------------------------------------------------------


class Scattered:
    """A weight, or what the optimiser keeps for it, as a tensor that is written; it is gathered
    only then."""

    def __init__(self, weight: Any, gather: Callable[[], Tensor]):
        self.shape, self.dtype, self.full_tensor = shape_of(weight), torch.float32, gather
        self.itemsize = self.dtype.itemsize

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)


def written_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights for a checkpoint, which all processes write together."""
    return {
        name: Scattered(weight, partial(gathered, weight)) if is_zero(weight) else weight
        for name, weight in weights.items()
    }
