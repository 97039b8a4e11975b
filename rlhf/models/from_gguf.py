"""How a GGUF file becomes an ordinary model in floating point: what transformers is told, and
reading it tensor by tensor, where each process keeps its slices."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from transformers import AutoConfig

from rlhf.config import ModelConfig
from rlhf.console import is_main_process
from rlhf.gguf_files import is_gguf
from rlhf.hub import Source, call_loader
from rlhf.models.forward import HEAD
from rlhf.models.unread import UNREAD, Unread, compute_buffers


def gguf_arguments(source: Source) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that unpack a GGUF file; {} for another source."""
    if not is_gguf(source.directory):
        return {}
    _announce(source.directory)
    _speed_up()
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def unread_gguf(
    factory: Any, source: Source, config: ModelConfig, **kwargs: Any
) -> tuple[Any, str | None]:
    """Make the model of a GGUF file on the meta device, for `shard` to read tensor by tensor.

    Returns: the model, and the reason where it must be read whole instead.
    """
    code, load = config.trust_remote_code, AutoConfig.from_pretrained
    settings = call_loader(load, source.directory, source.label, code, **kwargs)
    with torch.device("meta"):
        model = factory.from_config(
            settings,
            dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=code,
        )
    model.name_or_path = source.path
    return model, _leave_unread(model, source.directory)


def _leave_unread(model: Any, file: Path) -> str | None:
    """Note where its weights are, and compute its buffers, in place; see `unread_gguf`."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    _announce(file)
    _speed_up()
    processor, reader = _processor(file), GGUFReader(file)
    names = get_gguf_hf_weights_map(model, processor)
    stored = {
        names[t.name]: tuple(map(int, t.shape[::-1])) for t in reader.tensors if t.name in names
    }
    own = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] != HEAD}
    for name, parameter in own.items():
        if stored.get(name) != tuple(parameter.shape):
            return f"the file holds no {name} of its own shape"
    compute_buffers(model)
    setattr(model, UNREAD, Unread(own, partial(_tensors, file, names, own.keys())))
    return None


def _processor(file: Path) -> Any:
    """What puts the tensors of the file into the order of transformers."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as library

    kind = library.read_field(GGUFReader(file), "general.architecture")[0]
    factory = library.TENSOR_PROCESSORS.get(kind, library.TensorProcessor)
    return factory(config=library.load_gguf_checkpoint(str(file))["config"])


def _tensors(
    file: Path, names: dict[str, str], wanted: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`Unread.tensors` of a GGUF file."""
    from gguf import GGUFReader, dequantize

    processor = _processor(file)
    for stored in GGUFReader(file).tensors:
        if names.get(stored.name) in wanted:
            numbers = dequantize(stored.data, stored.tensor_type)
            how = {"tensor_key_mapping": names, "parsed_parameters": {"tensors": {}}}
            found = processor.process(weights=numbers, name=stored.name, **how)
            yield names[found.name], torch.from_numpy(numpy.ascontiguousarray(found.weights))


@cache
def _speed_up() -> None:
    """Make a table once that transformers makes for every module, which took longer than reading
    the file; and let its progress bar obey `quiet_libraries`."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm


@cache
def _announce(file: Path) -> None:
    """Say once why the start takes long."""
    if is_main_process():
        size = file.stat().st_size / 1e6
        # to stderr, because stdout may hold a model's answers
        print(
            f"reading {file} ({size:,.0f} MB): unpacking a GGUF file takes a while; "
            f"python -m rlhf.export path={file} out=<directory> writes one that loads at once",
            file=sys.stderr,
            flush=True,
        )
