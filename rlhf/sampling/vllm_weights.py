"""How the weights of a policy reach a vLLM server: `sampling.weights`.

    files     the model as safetensors in a folder that the server reads, adapters merged
    adapter   the model below the adapters once, then the LoRA adapter alone in each update
    nccl      the model from GPU to GPU, adapters merged, by TRL's client; not run yet

`VLLM` in vllm.py chooses and asks; here is what each way needs of a model, a folder or a package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from rlhf.config import InputError, one_line
from rlhf.console import is_main_process
from rlhf.distributed import is_sharded
from rlhf.models import copy_weights, plain_copy, unwrap_peft

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # limits that a server can be started with


def why_no_adapter(model: Any) -> str:
    """Why the weights of a causal LM cannot go over as an adapter; "" if they can."""
    if not isinstance(model, PeftModel):
        return "all weights train"
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            return "rows of new tokens train too"
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            return f"{name.removeprefix('base_model.model.')} is no linear layer"
    rank = adapter_rank(model)
    return "" if rank <= RANKS[-1] else f"vLLM takes ranks up to {RANKS[-1]}, not {rank}"


def adapter_rank(model: Any) -> int:
    """Rank of a model's LoRA adapter."""
    return model.peft_config[model.active_adapter].r


def server_arguments(model: Any, way: str) -> list[str]:
    """What a server is started with so that it takes weights in this way."""
    if way == "adapter":
        rank = next(rank for rank in RANKS if rank >= adapter_rank(model))
        return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    if way == "nccl":
        return ["--weight-transfer-config", '{"backend":"nccl"}']
    return []


def write_base(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write the model below the adapters as safetensors, on the main process; all that share a
    sharded model call this together."""
    base = unwrap_peft(model)
    if base is not model or is_sharded(model) or base.dtype != dtype:
        base = plain_copy(model, dtype, None if is_main_process() else "meta")
        copy_weights(model, base, with_adapter=False)
    if is_main_process():
        base.save_pretrained(folder)


def require_cuda(way: str) -> None:
    """Refuse `nccl` on a machine without a GPU."""
    if way == "nccl" and not torch.cuda.is_available():
        raise InputError(
            "sampling.weights=nccl sends the weights from GPU to GPU, and this machine shows no "
            "GPU to torch; set sampling.weights=files"
        )


class NCCL:
    """Weights from the current GPU to those of a server, by the client of TRL."""

    def __init__(self, where: str, url: str):
        """Join the server's group; `where` names it in messages."""
        self._where = where
        with self._errors():
            from trl.generation.vllm_client import VLLMClient

            self._client = VLLMClient(base_url=url)
            self._client.init_communicator("cuda")

    def send(self, model: Any) -> float:
        """Send the weights of a plain causal LM; return their size, MB."""
        with self._errors():
            self._client.update_model_params(model)
        return sum(parameter.nbytes for parameter in model.parameters()) / 1e6

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of TRL, requests, vLLM and NCCL
            raise InputError(
                f"sampling.weights=nccl: {self._where}: {one_line(error)}; start the server with "
                """VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend":"nccl"}', or """
                "set sampling.weights=files"
            ) from error


@contextmanager
def moved_adapter(model: Any) -> Iterator[None]:
    """In this block, the LoRA adapter of a model, which adds nothing before it is trained, adds
    something to each layer that it is on."""
    ups = [p for name, p in model.named_parameters() if ".lora_B." in name]
    before = [parameter.detach().clone() for parameter in ups]
    with torch.no_grad():
        for parameter in ups:
            parameter.add_(0.02)  # times a random row of lora_A: a tenth of a weight
        try:
            yield
        finally:
            for parameter, value in zip(ups, before, strict=True):
                parameter.copy_(value)


def megabytes(folder: Path) -> float:
    """Size of the files in a folder, MB."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
