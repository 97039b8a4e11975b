"""The optimiser of policy and critic: one kernel on a GPU and for large models, else the loop."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf.checkpoint.state import load_training_state, save_training_state
from rlhf.config import PPOConfig, PPOStageConfig
from rlhf.ppo.optimizer import describe_optimizers, make_optimizer

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def make_parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8), (8,), (8, 16)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def take_steps(parameters, optimizer, first, last):
    """The same gradients for the same steps, for any optimiser."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.device)
        optimizer.step()


def with_one_kernel(parameters):
    optimizer = make_optimizer(parameters, 1e-2, PPOConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def optimizer_of(shape, device="cpu", fused_adam=None):
    parameter = torch.empty(shape, device=device, requires_grad=True)
    return make_optimizer([parameter], 1e-2, PPOConfig(fused_adam=fused_adam))


def test_one_kernel_updates_large_models_and_those_on_a_gpu_unless_told_otherwise():
    assert not optimizer_of((999, 1000)).defaults["fused"]
    with FakeTensorMode():  # tensors that say they are on a GPU
        assert optimizer_of((3, 3), "cuda").defaults["fused"]
        assert not optimizer_of((3, 3), "cuda", fused_adam=False).defaults["fused"]
    large = optimizer_of((1000, 1000))
    assert large.defaults["fused"]
    assert not optimizer_of((1000, 1000), fused_adam=False).defaults["fused"]
    assert optimizer_of((3, 3), fused_adam=True).defaults["fused"]


def test_what_is_printed_names_the_models_that_one_kernel_updates():
    small, large = optimizer_of((3, 3)), optimizer_of((3, 3), fused_adam=True)
    assert describe_optimizers({"policy": small, "critic": small}) == ""
    assert describe_optimizers({"policy": small, "critic": large}).startswith(
        "AdamW in one kernel for critic (ppo.fused_adam=false"
    )
    assert "for policy and critic (" in describe_optimizers({"policy": large, "critic": large})


@pytest.mark.parametrize("device", DEVICES)
def test_one_kernel_steps_as_the_loop_does(device):
    plain, fused = make_parameters(), make_parameters(device)
    take_steps(plain, make_optimizer(plain, 1e-2, PPOConfig(weight_decay=0.1)), 0, 5)
    take_steps(fused, with_one_kernel(fused), 0, 5)
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-6)


def test_the_state_of_the_loop_continues_in_one_kernel(tmp_path):
    """A checkpoint from a CPU, or from an earlier version, resumes on a GPU."""
    whole, plain, fused = (make_parameters() for _ in range(3))
    take_steps(whole, make_optimizer(whole, 1e-2, PPOConfig(weight_decay=0.1)), 0, 6)
    optimizer = make_optimizer(plain, 1e-2, PPOConfig(weight_decay=0.1))
    take_steps(plain, optimizer, 0, 3)
    named = {"policy": {str(i): p.detach() for i, p in enumerate(plain)}}
    directory = tmp_path / "checkpoint-3"
    save_training_state(directory, named, {"policy": optimizer}, {}, PPOStageConfig())
    other = with_one_kernel(fused)
    moved = {"policy": {str(i): p.detach() for i, p in enumerate(fused)}}  # the same storage
    load_training_state(directory, moved, {"policy": other})
    assert other.param_groups[0]["fused"]
    take_steps(fused, other, 3, 6)
    for one, another in zip(whole, fused, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-6)
