"""Models without weights, of which each process then reads its slice from files.

Where the launcher shards, `load` leaves a model on the meta device, which holds shapes alone. A
fresh head and fresh adapters are put on it there. Then `shard` gives each process its slice of
every weight: no process ever holds a whole model.

GGUF files are read tensor by tensor (`from_gguf`), and new models are drawn so (`random_weights`).
What adapters add is added to each slice. Left out, and read whole as without sharding: models with
adapters to merge that are more than LoRA on linear layers, and files with other tensors than the
model has parameters (experts one by one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from rlhf.checkpoint import find_non_finite
from rlhf.config import InputError
from rlhf.distributed import (
    compute_device,
    default_device,
    detached,
    local,
    move,
    offloads,
    slice_weights,
    whole,
    zero_stage,
)
from rlhf.hub import ADAPTER, ADAPTER_WEIGHTS, Misfits, read_json, tensor_names, weight_files
from rlhf.models.forward import HEAD
from rlhf.models.shared_slices import run_in_slices, slice_base, slices_of
from rlhf.slices import like, own_rows, read_rows
from rlhf.zero import divide_weights, is_zero, make_runnable, put, save_slices

UNREAD = "_rlhf_unread"  # attribute of a model: `Unread`
RENAMED = {"lm_head.weight": "embed_out.weight"}  # in files of GPT-NeoX
HEADS = (HEAD, "lm_head", "embed_out")


class Unread:
    """Where the weights of a model on the meta device come from.

    Attributes:
        tensors: give name and value of one parameter after the other: a tensor, or a slice that a
            safetensors file gives.
        refuse: makes the error for a weight that is not finite.
    """

    def __init__(self, names: Iterable[str], tensors: Callable[[], Iterator[tuple[str, Any]]]):
        self.names, self.tensors = [*names], tensors
        self.refuse: Callable[[str], InputError] = InputError
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._added: dict[str, list[Callable[[], torch.Tensor]]] = {}

    def merge(self, wrapper: Any) -> Any:
        """Add what a LoRA adapter adds to each weight when that is read; return the model below."""
        for name, module in wrapper.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                added = partial(cast(Any, module).get_delta_weight, wrapper.active_adapter)
                self._added.setdefault(f"{name}.weight", []).append(added)
        return wrapper.unload()

    def settle(self, model: nn.Module, refuse: Callable[[str], InputError]) -> None:
        """Note the modules that the names mean, once tables have all their rows; with adapters
        around them, their names change."""
        self.refuse = refuse
        for name in self.names:
            owner, _, own = name.rpartition(".")
            self._places[name] = model.get_submodule(owner), own

    @torch.no_grad()
    def read(self, then: Callable[[nn.Parameter], None] = lambda _: None) -> str | None:
        """Read this process's slices; return what is wrong with them, if anything is.

        Args:
            then: called with each parameter that has been read; processes may do this together.
        """
        problem = None
        try:
            for name, stored in self.tensors():
                if name not in self._places:  # the head of another task
                    continue
                module, own = self._places[name]
                parameter = module.get_parameter(own)
                read_rows(parameter, stored)
                first, end = own_rows(parameter)
                for added in self._added.get(name, ()):
                    local(parameter).add_(added()[first:end].to(parameter.device))
                problem = problem or find_non_finite([(name, parameter)])
                then(parameter)
        except (SafetensorError, OSError) as error:
            return f"its weights cannot be read ({error})"
        return problem


def _in_files(names: dict[Path, list[tuple[str, str]]]) -> Iterator[tuple[str, Any]]:
    """`Unread.tensors` of safetensors files.

    Args:
        names: file -> names in it and those of the model's parameters.
    """
    for file, pairs in names.items():
        with safe_open(file, framework="pt") as tensors:
            for stored, name in pairs:
                yield name, tensors.get_slice(stored)


def leave_unread(model: Any, files: Sequence[Path]) -> str | None:
    """Note where the weights of a model on the meta device are, and compute its buffers, in place.

    Returns: the reason where the model must be read whole: its parameters, without a scalar head,
        are not in these files one by one.
    """
    stored: dict[str, tuple[Path, Sequence[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        stored |= {name: (file, shape) for name, shape in shapes.items()}
    names: dict[Path, list[tuple[str, str]]] = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] == HEAD:
            continue  # it is made anew, in float32
        known = (name, name.removeprefix(f"{model.base_model_prefix}."), RENAMED.get(name, ""))
        found = next((n for n in known if n in stored), None)
        if found is None or tuple(stored[found][1]) != tuple(parameter.shape):
            return f"its files hold no {name} of its own shape"
        names.setdefault(stored[found][0], []).append((found, name))
    if len(dict(model.named_buffers())) > len(dict(model.named_non_persistent_buffers())):
        return "its files hold more than parameters"
    compute_buffers(model)
    known_names = [name for pairs in names.values() for _, name in pairs]
    setattr(model, UNREAD, Unread(known_names, partial(_in_files, names)))
    return None


@torch.no_grad()
def compute_buffers(model: Any) -> None:
    """Give a model on the meta device its masks and frequencies, as transformers does."""
    for module in model.modules():
        own = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if own:
            model._init_weights(module)


def unread(model: nn.Module) -> Unread | None:
    """Where the weights of a model, or of one inside it, are; None if it has its weights."""
    found = (module.__dict__.get(UNREAD) for module in model.modules())
    return next(filter(None, found), None)


def pass_on(model: nn.Module, other: nn.Module) -> None:
    """Have another model with the same backbone read its weights in place of a model."""
    if (waits := unread(model)) is not None:
        own = dict(other.named_parameters())
        waits.names = [name for name in waits.names if name in own]
        setattr(other, UNREAD, waits)


def adds_products(adapter: Path) -> bool:
    """True for a stored adapter that adds products of two factors to linear layers, and no more; a
    base without weights can have it."""
    settings = read_json(adapter / ADAPTER)
    plain = settings.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    if settings.get("peft_type") != "LORA" or settings.get("target_parameters") or not plain:
        return False
    parts = [name.split(".") for name in tensor_names(adapter / ADAPTER_WEIGHTS)]
    factors = ["lora_A", "weight"], ["lora_B", "weight"]
    return all(len(p) > 2 and p[-2:] in factors and p[-3] not in HEADS for p in parts)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model that came without weights has weights of 0 in main memory that take
    no room: PEFT makes adapters where the weights are."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules() if unread(model) is not None else ():
        for name, own in module._parameters.items():
            if own is not None and own.is_meta:
                zeros = torch.zeros((), dtype=own.dtype).expand(own.shape)
                module._parameters[name] = made.setdefault(own, nn.Parameter(zeros))
                kept.append((module, name, own))
    yield
    for module, name, own in kept:
        own.requires_grad_(made[own].requires_grad)
        module._parameters[name] = own


def _fill_token_rows(model: nn.Module) -> None:
    """Give the rows of tables that adapters train their first numbers, which PEFT did not see."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            table = whole(detached(cast(Any, layer.get_base_layer()).weight))
            for name, rows in layer.trainable_tokens_delta.items():
                first = table[layer.token_indices[name]]
                rows.data.copy_(like(first, rows.data))
                layer.trainable_tokens_original[name].copy_(first)


def _gather_token_rows(model: nn.Module) -> None:
    """Have DeepSpeed gather a table and the rows that adapters train where they are read: not in
    the forward pass of their own modules."""
    from deepspeed import zero

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            table = cast(Any, layer.get_base_layer()).weight
            for weight in filter(is_zero, (table, *layer.trainable_tokens_delta.values())):
                zero.register_external_parameter(layer, weight)


def shard_unread(model: Any) -> None:
    """`shard` a model that came without weights."""
    if unread(model) is not None:
        shard(model)


def shard(model: Any, on_cpu: bool = False) -> None:
    """Give each process its slice of every weight of a model, with adapters and heads, in place.

    Args:
        on_cpu: slices wait in main memory, as where the launcher asks for that.

    Raises:
        InputError: on all processes, if one of them read a number that is not finite.
    """
    on_cpu |= offloads()
    if zero_stage() == 3:
        _divide(model, on_cpu)
        return
    slice_weights(model, on_cpu)
    _read(model, on_cpu)


def _divide(model: Any, on_cpu: bool) -> None:
    """`shard` under DeepSpeed, of a base its slices alone. Weights that come from files are whole
    one after the other."""
    waits = unread(model)
    if waits is not None:
        _take_memory(model)
    divided = [*(slices_of(model) or model).parameters()]
    known = {id(weight) for weight in divided}
    if waits is not None:
        problem = waits.read(lambda p: divide_weights([p] if id(p) in known else [], on_cpu))
        _have_been_read(model, waits, problem)
    divide_weights(divided, on_cpu)
    save_slices(model)
    _gather_token_rows(model)
    move(model, default_device())  # what is whole


def _take_memory(model: nn.Module) -> None:
    """Give weights on the meta device main memory, of which none is used until it is written to."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and own.is_meta:
                empty = nn.Parameter(torch.empty_like(own, device="cpu"), own.requires_grad)
                module._parameters[name] = made.setdefault(own, empty)


def shard_base(base: Any, whole_tables: bool = False) -> None:
    """`shard` the base of several roles, before there are any.

    Args:
        whole_tables: rows of the embedding tables will train.
    """
    slice_base(base, offloads(), whole_tables)
    slices: Any = slices_of(base)
    if zero_stage() == 3:
        _divide(base, offloads())
        base.tie_weights()
        make_runnable(slices, offloads(), slices.parts)
        run_in_slices(base, base)
        return
    _read(base, offloads())
    base.tie_weights()  # a tied table, which is whole
    move(base, default_device())
    slices(lambda: None)  # FSDP2 takes the first module that runs for the outermost one


def _read(model: Any, on_cpu: bool) -> None:
    """Read the slices of a model that came without weights."""
    waits = unread(model)
    if waits is None:
        return
    device = "cpu" if on_cpu else compute_device(model)
    for units in filter(None, (slices_of(model), model)):
        units._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    _have_been_read(model, waits, waits.read())


def _have_been_read(model: Any, waits: Unread, problem: str | None) -> None:
    """Finish a model whose slices all processes have read; refuse it if one has a problem."""
    problems = gather_object([problem])
    for module in model.modules():
        module.__dict__.pop(UNREAD, None)
    for found in filter(None, problems):
        raise waits.refuse(found)
    _fill_token_rows(model)


@torch.no_grad()
def read_weights(model: Any, directory: Path) -> None:
    """Read this process's slices of what a Trainer saved: a whole model, or its adapter; in place.

    Raises:
        InputError: a weight of the model, or of its adapter, is not there.
    """
    is_adapted = isinstance(model, PeftModel)
    files = weight_files(directory, {})
    own: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    if is_adapted:
        files = [directory / ADAPTER_WEIGHTS]
        own = get_peft_model_state_dict(model, own, save_embedding_layers=False)
    known: set[int] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(own.keys() & tensors.keys()):  # in one order on all processes
                if is_zero(own[name]):
                    put(own[name], tensors.get_tensor(name))
                else:
                    read_rows(own[name], tensors.get_slice(name))
                known.add(id(own[name]))  # of tied tables, one is in the file
    lost = [name for name, tensor in own.items() if id(tensor) not in known]
    if lost:
        raise InputError(f"{directory} does not fit the model: {Misfits(lost)}")
