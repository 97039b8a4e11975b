"""Stages after each other in one process, as in a notebook, with other precisions.

Run: python -m pytest tests/end_to_end/test_stages_in_one_process.py
"""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from helpers.tiny import tiny_tokenizer
from helpers.tiny_ppo import make_config

import rlhf
from rlhf import train_ppo, train_sft
from rlhf.checkpoint import make_record
from rlhf.config import DatasetConfig, InputError, ModelConfig, SFTStageConfig
from rlhf.distributed import make_accelerator


@pytest.fixture
def precisions(monkeypatch):
    """Autocast of every forward pass with gradients: name of the dtype, or float32."""
    seen = []

    def linear(*arguments, **keywords):
        if torch.is_grad_enabled():
            on = torch.is_autocast_enabled("cpu")
            seen.append(str(torch.get_autocast_dtype("cpu")) if on else "float32")
        return original(*arguments, **keywords)

    original = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    return seen


def sft(policy_dir, folder, name, precision):
    config = SFTStageConfig(
        run_name=name,
        runs_dir=str(folder),
        precision=precision,
        num_samples=0,
        model=ModelConfig(path=str(policy_dir)),
        dataset=DatasetConfig(
            path=str(folder / "prompts.jsonl"), format="text", max_length=64, eval_fraction=0.3
        ),
    )
    config.dataset.format = "prompt_completion"
    config.trainer |= {"max_steps": 1, "per_device_train_batch_size": 2}
    train_sft(config)


def test_each_stage_has_its_own_precision(policy_dir, tmp_path, precisions, capfd):
    ppo = make_config(policy_dir, tmp_path, num_updates=1)
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(rows.read_text().replace("}\n", ', "completion": " an apple"}\n'))
    ppo.evaluation.num_prompts = 0
    for number, precision in enumerate(["float32", "bfloat16", "float32", "bfloat16"]):
        for stage in ("sft", "ppo"):
            precisions.clear()
            if stage == "sft":
                sft(policy_dir, tmp_path, f"run{number}", precision)
            else:
                ppo.run_name, ppo.precision = f"run{number}", precision
                train_ppo(ppo)
            expected = {"float32": "float32", "bfloat16": "torch.bfloat16"}[precision]
            assert expected in precisions, (stage, precision)
            if precision == "float32":
                assert set(precisions) == {"float32"}, stage


def test_an_accelerator_of_another_precision_is_in_the_way_of_nothing():
    Accelerator(cpu=True, mixed_precision="bf16")
    assert make_accelerator("float32").mixed_precision == "no"
    assert make_accelerator("bfloat16").mixed_precision == "bf16"


def test_one_of_several_processes_on_another_device_is_told_so(monkeypatch):
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda", 1))
    with pytest.raises(InputError, match="in a group of 2 on cuda:1, and a stage on the CPU"):
        make_accelerator("float32")


def test_another_device_before_is_in_the_way_of_nothing():
    PartialState()
    PartialState._shared_state["device"] = torch.device("cuda", 0)
    try:
        assert make_accelerator("float32").device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_source_tree_that_is_not_installed_has_a_manifest(monkeypatch):
    def no_metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("rlhf.checkpoint.record.version", no_metadata)
    versions = make_record("sft", SFTStageConfig(), None, tiny_tokenizer()).versions
    assert versions.pop("rlhf") == rlhf.__version__
    assert set(versions.values()) == {"not installed"}
