"""How steps become CUDA graphs, on a CPU: a stand-in for `torch.cuda` that is as strict.

Left out: kernels, and whether a family can be captured on a real GPU (tests/gpu/test_decode.py).

Run: pytest tests/sampling/test_graph_capture.py
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.sampling import Sampling, generate, uniform_noise, use_engine

TOKENIZER = tiny_tokenizer()
PROMPTS = [[40 + i, *range(60, 60 + i % 4)] for i in range(12)]
BUDGET = 9
NOISE = uniform_noise((3,), range(12), BUDGET)
SAMPLING = Sampling(BUDGET, tuple(range(3, 320, 9)), torch.tensor([0]), 3.0, 0.98, 300)
WAITS = ("_local_scalar_dense", "nonzero")  # the host reads a number of the device


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in WAITS):
            raise RuntimeError("operation not permitted when stream is capturing")
        return function(*args, **kwargs or {})


class Stream:
    device_index, is_set_up = 0, False

    def wait_stream(self, other):
        pass


class Graph:
    """Replaying runs the step that was captured, on the tensors of then."""

    def replay(self):
        assert self.places == [x.data_ptr() for x in self.cuda.tensors()]
        step = next(s for s in self.cuda.decoder._steps.values() if s.graph is self)
        with NoReads():
            step()


class Cuda:
    """What `GraphDecoder` uses of `torch.cuda`. Capturing computes nothing."""

    def __init__(self, monkeypatch, model):
        self.decoder = use_engine(model, "graph", check_every=4)._steps
        self.decoder._captures = True
        self.main = self.current = Stream()
        self.users, self.generator_is_free = {}, True
        for name in ("current_stream", "stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name, make in (("Stream", Stream), ("CUDAGraph", Graph), ("graph_pool_handle", Stream)):
            monkeypatch.setattr(torch.cuda, name, lambda *_, make=make: make())
        monkeypatch.setattr(torch.cuda, "default_generators", [self])

    def current_stream(self, device):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def clone_state(self):
        return True  # not in a capture

    def graphsafe_set_state(self, state):
        self.generator_is_free = state

    def tensors(self):
        values = vars(self.decoder._buffers).values()
        return [x for value in values for x in (value if isinstance(value, list) else [value])]

    @contextmanager
    def stream(self, stream):
        self.current = stream
        stream.is_set_up = True
        yield
        self.current = self.main

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert stream.is_set_up and capture_error_mode == "thread_local"
        assert not torch.is_autocast_cache_enabled()  # it has the weights of before an update
        assert pool not in self.users or len(self.users[pool]), "use_count > 0"
        before = [x.clone() for x in self.tensors()]
        self.current, self.generator_is_free = stream, False
        with NoReads():
            yield  # an error leaves stream and generator as they are, as in torch
        self.current, self.generator_is_free = self.main, True
        for tensor, old in zip(self.tensors(), before, strict=True):
            tensor.copy_(old)
        graph.cuda, graph.places = self, [x.data_ptr() for x in self.tensors()]
        self.users.setdefault(pool, weakref.WeakSet()).add(graph)


def assert_same(actual, expected):
    assert actual.ids == expected.ids and actual.finished == expected.finished
    for mine, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_sample_what_the_loop_does_and_never_wait(family, monkeypatch):
    model = tiny_model(family, TOKENIZER)
    expected = generate(model, PROMPTS, SAMPLING, NOISE)
    cuda = Cuda(monkeypatch, model)
    assert_same(generate(model, PROMPTS, SAMPLING, NOISE), expected)
    num_captured = cuda.decoder.num_captured
    assert_same(generate(model, PROMPTS, SAMPLING, NOISE), expected)
    assert cuda.decoder.num_captured == num_captured > 0
    assert cuda.current is cuda.main and cuda.generator_is_free


def test_a_larger_batch_captures_again_in_a_pool_of_its_own(monkeypatch):
    """The allocator asserts that the graphs of a pool are not all gone; the probe of three rows
    comes before the first rollout."""
    model = tiny_model("llama", TOKENIZER)
    expected = generate(model, PROMPTS, SAMPLING, NOISE)
    cuda = Cuda(monkeypatch, model)
    generate(model, PROMPTS[:3], SAMPLING, NOISE[:3])
    assert_same(generate(model, PROMPTS, SAMPLING, NOISE), expected)
    assert cuda.decoder.num_captured == 3 and len(cuda.users) == 2


def test_weights_at_another_place_are_captured_again(monkeypatch):
    """A graph would go on reading the memory in which they were."""
    model = tiny_model("llama", TOKENIZER)
    cuda = Cuda(monkeypatch, model)
    first = generate(model, PROMPTS, SAMPLING, NOISE)
    head = model.lm_head.weight
    with torch.no_grad():
        head.mul_(0.5)
    moved = generate(model, PROMPTS, SAMPLING, NOISE)
    assert moved.ids != first.ids and cuda.decoder.num_captured == 2  # in place: as they were
    head.data = head.data.clone()
    assert_same(generate(model, PROMPTS, SAMPLING, NOISE), moved)
    assert cuda.decoder.num_captured == 4


def test_a_capture_that_fails_leaves_the_stream_and_the_random_numbers_usable(monkeypatch):
    model = tiny_model("llama", TOKENIZER)
    cuda = Cuda(monkeypatch, model)
    model.model.register_forward_hook(lambda *_: bool(torch.ones(()) > 0) and None)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        generate(model, PROMPTS, SAMPLING, NOISE)
    assert cuda.current is cuda.main and cuda.generator_is_free
