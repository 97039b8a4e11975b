"""The engine `graph`: one step of decoding on a cache of fixed size, replayed on a GPU as one CUDA
graph, so that a token costs one launch.

    buckets  the step is captured once for each number of rows (the rows asked for, then 64, 32, 16,
             8) and length of the cache that occurs. All buckets are views of the same buffers. The
             graphs stay for the whole run: they read the model's weights where they are.
    a step   reads the latest token of each row and chooses the next one.
    checks   every `check_every` steps, the host reads the tokens and looks for finished rows. What
             a row gets after its end is cut off. When few enough rows are left, they move to the
             next smaller bucket.

On a CPU the same steps run without a graph. Left out: caches that are not keys and values of every
token alone (state-space models, for example), which `GraphDecoder` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from rlhf.models import accepts, unwrap_peft
from rlhf.sampling.settings import Endings, Sampling
from rlhf.sampling.token_choice import choose
from rlhf.sampling.token_loop import Step, prefill

FEWEST_ROWS = 8  # of a bucket: fewer cost a GPU the same
LENGTH_STEP = 128  # tokens between two buckets of length


@dataclass
class Buffers:
    """What a step reads and writes, at fixed addresses; R rows, L tokens, N = `check_every`.

    Attributes:
        keys, values: of each layer, (R, H, L, D).
        filled: of each layer, () int64: number of tokens in the cache.
        mask: (R, L) int64; 0 for the padding before a prompt, 1 for all that follows.
        token, position: (R, 1) int64; the latest token of each row, and its position.
        noise: (R, N) float64; random numbers of the next N steps.
        column: (1,) int64; number of steps since the last check.
        ids, logprobs: (R, N); tokens chosen since the last check.
    """

    keys: list[Tensor]
    values: list[Tensor]
    filled: list[Tensor]
    mask: Tensor
    token: Tensor
    position: Tensor
    noise: Tensor
    column: Tensor
    ids: Tensor
    logprobs: Tensor

    @classmethod
    def like(cls, cache: Any, num_rows: int, length: int, check_every: int) -> Buffers:
        """Empty buffers for the keys and values of a filled cache."""
        device = cache.layers[0].keys.device

        def empty(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def wide(like: Tensor) -> Tensor:
            shape = num_rows, like.shape[1], length, like.shape[3]
            return torch.zeros(shape, dtype=dtype_of(cache), device=device)

        return cls(
            keys=[wide(layer.keys) for layer in cache.layers],
            values=[wide(layer.values) for layer in cache.layers],
            filled=[empty() for _ in cache.layers],
            mask=empty(num_rows, length),
            token=empty(num_rows, 1),
            position=empty(num_rows, 1),
            noise=empty(num_rows, check_every, dtype=torch.float64),
            column=empty(1),
            ids=empty(num_rows, check_every),
            logprobs=empty(num_rows, check_every, dtype=torch.float32),
        )

    def fill(self, cache: Any, mask: Tensor, token: Tensor) -> None:
        """Take over what a prefill has read, and the first token (B,) of each response."""
        count, width = mask.shape
        for i, layer in enumerate(cache.layers):
            self.keys[i][:count, :, :width] = layer.keys
            self.values[i][:count, :, :width] = layer.values
            self.filled[i].fill_(width)
        self.mask[:count] = 1
        self.mask[:count, :width] = mask.long()
        self.token[:count] = token[:, None]
        self.position[:count] = mask.sum(dim=1, keepdim=True)

    def move_to_front(self, rows: Tensor, width: int) -> None:
        """Make these rows the first ones; `width` tokens of the cache are filled."""
        for tensor in (*self.keys, *self.values):
            tensor[: len(rows), :, :width] = tensor[rows, :, :width]
        for tensor in (self.mask, self.token, self.position):
            tensor[: len(rows)] = tensor[rows]

    def cache(self, num_rows: int, length: int) -> Cache:
        """A cache of transformers that reads and writes the first rows and tokens."""
        layers: list[Any] = []
        for keys, values, filled in zip(self.keys, self.values, self.filled, strict=True):
            layer = _Layer(length)
            layer.keys, layer.values = keys[:num_rows, :, :length], values[:num_rows, :, :length]
            layer.cumulative_length, layer.is_initialized = filled, True
            layer.dtype, layer.device, layer.batch_size = keys.dtype, keys.device, num_rows
            layer.num_heads, layer.k_head_dim = keys.shape[1], keys.shape[3]
            layer.v_head_dim = values.shape[3]
            layers.append(layer)
        return Cache(layers=layers)


class GraphDecoder:
    """Samples with one model; keeps its buffers and graphs from call to call.

    Attributes:
        model: a causal LM (PEFT allowed); its weights may change in place between two calls.
        check_every: steps between two looks for finished rows.
        num_captured: graphs captured so far.
    """

    def __init__(self, model: Any, check_every: int):
        """Raise a ValueError if the model's cache cannot have a fixed size."""
        layers = StaticCache(unwrap_peft(model).config, max_cache_len=1).layers
        others = {type(layer).__name__ for layer in layers if type(layer) not in STATIC}
        if others:
            raise ValueError(f"its cache has layers of another kind ({', '.join(sorted(others))})")
        self.model, self.check_every, self.num_captured = model, check_every, 0
        self._device = next(model.parameters()).device
        self._captures = self._device.type == "cuda"
        self._buffers: Buffers | None = None
        self._steps: dict[Any, _Step] = {}
        self._pool: Any = None  # memory of all graphs
        self._stream: Any = None  # on which steps are captured
        self._places: list[int] = []  # addresses of the weights that the graphs read

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: Tensor | None
    ) -> Iterator[Step]:
        """As `loop`."""
        device, ends = self._device, Endings(sampling, len(prompts))
        places = [parameter.data_ptr() for parameter in self.model.parameters()]
        if places != self._places:
            self._forget_steps()
            self._places = places
        noise = None if noise is None else noise.to(device)
        with self._autocast():
            cache: Any = DynamicCache()  # keys and values of every token, also in sliding windows
            logits, mask = prefill(self.model, prompts, cache)
            draws = None if noise is None else noise[:, 0]
            token, logprob = choose(logits, sampling, sampling.forbidden.to(device), draws)
            width = mask.shape[1]
            buffers = self._reserve(cache, len(prompts), width + sampling.max_new_tokens)
            buffers.fill(cache, mask, token)
        del cache, logits
        slots = list(range(len(prompts)))  # row in each slot of the bucket
        chosen, logprobs = token[:, None].tolist(), logprob[:, None].tolist()
        active, t = list(slots), 0
        while True:
            for j in range(len(chosen[0])):
                at = {row: slot for slot, row in enumerate(slots)}
                tokens = [chosen[at[row]][j] for row in active]
                done = ends(active, tokens)
                yield Step(active, tokens, [logprobs[at[row]][j] for row in active], done)
                active = [row for row, end in zip(active, done, strict=True) if not end]
                t += 1
                if not active or t == sampling.max_new_tokens:
                    return
            slots = self._compact(slots, active, width + t - 1)
            count = min(self.check_every, sampling.max_new_tokens - t)
            if noise is not None:
                buffers.noise[: len(slots), :count] = noise[slots, t : t + count]
            step = self._step(len(slots), width + t - 1 + count, sampling, noise is None)
            buffers.column.zero_()
            for _ in range(count):
                self._run(step)
            chosen = buffers.ids[: len(slots), :count].tolist()
            logprobs = buffers.logprobs[: len(slots), :count].tolist()

    def _reserve(self, cache: Any, num_rows: int, length: int) -> Buffers:
        """Buffers of at least this size; larger ones than before end all graphs."""
        kept = self._buffers
        if kept is not None:
            old_rows, old_length = kept.mask.shape
            fits = num_rows <= old_rows and length <= old_length
            if fits and kept.keys[0].dtype == dtype_of(cache):
                return kept
            num_rows, length = max(num_rows, old_rows), max(length, old_length)
            self._buffers = kept = None
            self._forget_steps()
        self._buffers = Buffers.like(cache, num_rows, bucket_length(length), self.check_every)
        return self._buffers

    def _forget_steps(self) -> None:
        """Drop all graphs. The allocator refuses a pool whose graphs are all gone."""
        self._steps.clear()
        self._pool = None

    def _compact(self, slots: list[int], active: list[int], width: int) -> list[int]:
        """Move the active rows to the front, once they fit into a smaller bucket; return the row in
        each of its slots. Finished rows take the slots that are left over."""
        num_rows = bucket_rows(len(active), len(slots))
        if num_rows == len(slots):
            return slots
        assert self._buffers is not None
        at, going = {row: slot for slot, row in enumerate(slots)}, {*active}
        kept = [*active, *(row for row in slots if row not in going)][:num_rows]
        index = torch.tensor([at[row] for row in kept], device=self._device)
        self._buffers.move_to_front(index, width)
        return kept

    def _step(self, num_rows: int, length: int, sampling: Sampling, is_greedy: bool) -> _Step:
        """The step of the smallest bucket for so many rows and tokens."""
        assert self._buffers is not None
        length = min(bucket_length(length), self._buffers.mask.shape[1])
        choice = sampling.temperature, sampling.top_p, sampling.top_k, is_greedy
        forbidden = tuple(sampling.forbidden.tolist())
        key = (num_rows, length, choice, forbidden, torch.is_autocast_enabled(self._device.type))
        if key not in self._steps:
            sizes = num_rows, length
            self._steps[key] = _Step(self.model, self._buffers, *sizes, sampling, is_greedy)
        return self._steps[key]

    def _run(self, step: _Step) -> None:
        if step.graph is not None:
            step.graph.replay()
            return
        with self._autocast():
            if self._captures:
                self._run_and_capture(step)
            else:
                step()

    def _run_and_capture(self, step: _Step) -> None:
        """Run a step, and capture it for its next time. Capturing computes nothing."""
        cuda, device = torch.cuda, self._device
        current = cuda.current_stream(device)
        self._stream = self._stream or cuda.Stream(device)
        self._stream.wait_stream(current)
        # libraries set themselves up for a stream, outside of the graph
        with cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        self._pool = self._pool or cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog, may go on
        options = {"stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with cuda.graph(graph, pool=self._pool, **options):
                step()
        except BaseException:  # torch leaves its stream and its random numbers as in the capture
            cuda.set_stream(current)
            generator = cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        step.graph = graph
        self.num_captured += 1

    def _autocast(self) -> torch.autocast:
        """Autocast as it is, but without its cache of weights: a graph would go on reading the
        weights that were cached when it was captured."""
        kind = self._device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return torch.autocast(kind, dtype, enabled, cache_enabled=False)


STATIC = (StaticLayer, StaticSlidingWindowLayer)


def dtype_of(cache: Any) -> torch.dtype:
    """Type of the buffers for this cache. Under autocast it is that in which attention reads: keys
    may be in float32 there, and values in bfloat16."""
    keys = cache.layers[0].keys
    kind = keys.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype


class _Layer(StaticLayer):
    """Keeps keys and values in the type of the buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        buffer: Any = self.keys
        return super().update(key_states.to(buffer.dtype), value_states.to(buffer.dtype))


class _Step:
    """One token for the first rows of the buffers.

    Attributes:
        graph: the captured step; None before its first run and on a CPU.
    """

    def __init__(
        self,
        model: Any,
        buffers: Buffers,
        num_rows: int,
        length: int,
        sampling: Sampling,
        is_greedy: bool,
    ):
        self.model, self.sampling, self.is_greedy = model, sampling, is_greedy
        self.graph: Any = None
        self._forbidden = sampling.forbidden.to(buffers.mask.device)
        self._rows, self._column = slice(num_rows), buffers.column
        self._all = buffers
        self._inputs: dict[str, Any] = {
            "input_ids": buffers.token[:num_rows],
            "attention_mask": buffers.mask[:num_rows, :length],
            "past_key_values": buffers.cache(num_rows, length),
            "use_cache": True,
        }
        if accepts(model, "position_ids"):
            self._inputs["position_ids"] = buffers.position[:num_rows]

    def __call__(self) -> None:
        rows, buffers = self._rows, self._all
        logits = self.model(**self._inputs).logits[:, -1].float()
        draws = None
        if not self.is_greedy:
            draws = buffers.noise[rows].index_select(1, self._column)[:, 0]
        token, logprob = choose(logits, self.sampling, self._forbidden, draws)
        buffers.ids[rows].index_copy_(1, self._column, token[:, None])
        buffers.logprobs[rows].index_copy_(1, self._column, logprob[:, None])
        buffers.token[rows].copy_(token[:, None])
        buffers.position[rows].add_(1)
        self._column.add_(1)


def bucket_rows(num_active: int, num_rows: int) -> int:
    """Rows of the smallest bucket for the active ones of `num_rows`: a power of two, at least
    `FEWEST_ROWS`, if that is fewer."""
    power = 1 << (num_active - 1).bit_length()
    return min(num_rows, max(power, FEWEST_ROWS))


def bucket_length(length: int) -> int:
    """Tokens of the smallest bucket for so many: a multiple of 128, of 256 above 1024, of 512 above
    2048, ... so that little is left over and the buckets are few."""
    step = max(LENGTH_STEP, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step
