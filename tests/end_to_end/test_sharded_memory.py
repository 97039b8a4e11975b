"""The memory of each of two processes that train one model in slices is its share of the weights,
gradients and optimiser states, from the first read to the checkpoint, and one tensor more while
`final/` is written. The copies that PPO makes are those that `rlhf.plan` reckons.

Memory of a process is what it holds at once: pages of files that it maps are the system's, and the
C library, which would keep freed memory for later, gives it back here at once.

Run: python -m pytest -m slow tests/end_to_end/test_sharded_memory.py
"""

import gc
import json

import pytest
import torch
from helpers.memory import Peak, give_back_at_once
from helpers.sampled_shares import sampled
from helpers.sharded import in_group, text_of
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig

from rlhf.checkpoint.state import save_training_state, take_state
from rlhf.config import ModelConfig, PeftConfig, PPOConfig, StageConfig
from rlhf.distributed import clip_gradients, make_accelerator, share
from rlhf.models import (
    ScalarModel,
    add_lora,
    load_policy,
    model_memory,
    scalar_role,
    shard,
    shard_base,
    what_to_save,
)
from rlhf.plan.counting import measure
from rlhf.plan.launches import Setting, estimate, main_memory
from rlhf.ppo.optimizer import make_optimizer
from rlhf.sampling import use_engine
from rlhf.slices import gathered_bytes
from rlhf.tokenizer import load_tokenizer


def train(path, folder, measures):
    """Load, make two steps, save a checkpoint and the result; write the peaks of this process."""
    accelerator, config = make_accelerator("float32"), ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config)
    with Peak(daemon=True) as peak:
        with Peak(daemon=True) as loading:
            model = load_policy(config, tokenizer, in_slices=True)
            shard(model)
        share(model, accelerator)
        optimizer = make_optimizer(model.parameters(), 1e-3, PPOConfig())
        for _ in range(2):
            ids = torch.arange(8)[None]
            accelerator.backward(model(input_ids=ids).logits.square().mean())
            clip_gradients(model.parameters(), 1.0, accelerator)
            optimizer.step()
            optimizer.zero_grad()
        parts = {"policy": model}, {"policy": optimizer}
        save_training_state(folder / "checkpoint-1", *parts, {"update": 1}, StageConfig())
    with Peak(daemon=True) as final:
        plain, _ = what_to_save(model, PeftConfig(), None, folder=folder)
        if accelerator.is_main_process:
            plain.save_pretrained(folder / "final")
    if measures:
        numbers = {"peak": peak.bytes, "loading": loading.bytes, "layer": gathered_bytes(model)}
        numbers |= {"final": final.bytes, "tensor": max(p.nbytes for p in model.parameters())}
        (folder / f"peak-{accelerator.process_index}.json").write_text(json.dumps(numbers))


def sample_and_copy(path, folder, measures):
    """Train a policy in bfloat16 by a step, and hold what PPO then has at once: slices with Adam's
    states, the whole copy that samples, and the copy from which a checkpoint is written. Then
    sample from the slices, and from those of a copy in float32."""
    accelerator = make_accelerator("float32")
    config = ModelConfig(path=str(path), dtype="bfloat16")
    tokenizer = load_tokenizer(config)
    with Peak(daemon=True) as peak:
        model = load_policy(config, tokenizer, in_slices=True)
        shard(model)
        share(model, accelerator)
        optimizer = make_optimizer(model.parameters(), 1e-3, PPOConfig())
        accelerator.backward(model(input_ids=torch.arange(8)[None]).logits.square().mean())
        optimizer.step()
        optimizer.zero_grad()
        use_engine(model, "loop", dtype=torch.bfloat16).refresh()
        parts = {"policy": model}, {"policy": optimizer}, {"update": 1}, StageConfig()
        taken = take_state(folder / "checkpoint-9", *parts, copies=True)
        peak.settle()
    taken.write()
    del taken
    use_engine(model)
    with Peak(daemon=True) as layers:
        sampled(model, tokenizer, [accelerator.process_index])
    with Peak(daemon=True) as sliced:
        engine = use_engine(model, dtype=torch.float32, in_slices=True)
        engine.refresh()
        sampled(model, tokenizer, [accelerator.process_index])
    if measures:
        numbers = {"copies": peak.bytes, "layers": layers.bytes, "layer": gathered_bytes(model)}
        numbers |= {"sliced": sliced.bytes, "counted": model_memory(engine.copy).weights}
        (folder / f"copies-{accelerator.process_index}.json").write_text(json.dumps(numbers))


def train_adapters(path, folder, on_one_base, measures):
    """Load a policy with LoRA, or policy and critic on one base, and make two steps; write the peak
    of this process."""
    accelerator, config = make_accelerator("float32"), ModelConfig(path=str(path))
    tokenizer, lora = load_tokenizer(config), PeftConfig(enabled=True, r=4)
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool)
    with Peak(daemon=True) as peak:
        model = load_policy(config, tokenizer, in_slices=True)
        if on_one_base:
            shard_base(model)
            critic = add_lora(scalar_role(model, config), lora, "SEQ_CLS", 0)
            policy = add_lora(model, lora, "CAUSAL_LM", 0)
            roles = {policy: lambda: policy(input_ids=ids).logits}
            roles[ScalarModel(critic)] = lambda: ScalarModel(critic)(ids, mask)
        else:
            policy = add_lora(model, lora, "CAUSAL_LM", 0)
            shard(policy)
            roles = {policy: lambda: policy(input_ids=ids).logits}
        for role, read in roles.items():
            share(role, accelerator)
            trained = [p for p in role.parameters() if p.requires_grad]
            optimizer = make_optimizer(trained, 1e-3, PPOConfig())
            for _ in range(2):
                accelerator.backward(read().square().mean())
                clip_gradients(trained, 1.0, accelerator)
                optimizer.step()
                optimizer.zero_grad()
    if measures:
        numbers = {"peak": peak.bytes, "adapters": sum(p.nbytes for p in trained)}
        name = f"adapters-{on_one_base}-{accelerator.process_index}.json"
        (folder / name).write_text(json.dumps(numbers))


def train_both(warm_up, path, folder):
    """A tiny model first: libraries take memory at their first use."""
    give_back_at_once()
    for source, measures in ((warm_up, False), (path, True)):
        train(source, folder if measures else folder / "warm_up", measures)
        for on_one_base in (False, True):
            train_adapters(source, folder, on_one_base, measures)
            gc.collect()
        sample_and_copy(source, folder if measures else folder / "warm_up", measures)


def planned_copies(path) -> float:
    """What `rlhf.plan` reckons for `sample_and_copy`."""
    setting = Setting("ppo", 2, 8, 8, dtype="bfloat16", critic=False, sampled_rows=0)
    model = measure(AutoConfig.from_pretrained(path), setting.length, False, setting.dtype)
    models = estimate(model, setting, "fsdp2").models
    held = models["policy"].weights + models["policy"].adam + models["sampler"].weights
    return held + main_memory(model, setting, "fsdp2") / setting.gpus


@pytest.mark.slow
def test_each_process_has_its_share_of_weights_gradients_and_optimiser(tmp_path):
    tokenizer, small = tiny_tokenizer(), tmp_path / "small"
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
    sizes = {small: {}, tmp_path / "model": wide}
    for path, values in sizes.items():
        model = tiny_model("llama", tokenizer, **values)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights > 4 * 200e6
    (tmp_path / "warm_up").mkdir()
    log = tmp_path / "log"
    codes = in_group(train_both, small, tmp_path / "model", tmp_path, log=log, seconds=900)
    assert codes == [0, 0], text_of(log)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"peak-{rank}.json").read_text())
        share_of_all = 4 * weights / 2  # weights, gradients and two moments, over two processes
        assert found["peak"] < 1.3 * share_of_all + found["layer"], found
        assert found["loading"] < 1.3 * weights / 2 + found["layer"], found
        assert found["final"] < 5 * found["tensor"], "one is gathered at a time"
        assert found["peak"] > 0.9 * share_of_all, "the measurement sees the memory"
        held = json.loads((tmp_path / f"copies-{rank}.json").read_text())
        assert held["copies"] == pytest.approx(planned_copies(tmp_path / "model"), rel=0.15)
        assert held["layer"] < held["layers"] < 4 * held["layer"], held  # of bfloat16
        # slices in float32, and layers, which are twice as large as in bfloat16
        assert 0.9 * held["counted"] < held["sliced"] < held["counted"] + 6 * held["layer"], held
        for on_one_base in (False, True):
            own = json.loads((tmp_path / f"adapters-{on_one_base}-{rank}.json").read_text())
            # the frozen base; of each role's adapters also gradients, their mean and two moments
            limit = 1.3 * (weights / 2 + 5 * own["adapters"] * (1 + on_one_base)) + found["layer"]
            assert 0.9 * weights / 2 < own["peak"] < limit, (on_one_base, own, limit)
