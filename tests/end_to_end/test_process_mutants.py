"""Plant bugs in what the processes do together, one at a time: each must change the result of two
processes, or end them.

A mutant replaces one passage of a module in both processes, which FSDP2 shards on the CPU. What
one process gives is the expectation, compared as in test_sharded.py.

Run: python -m pytest tests/end_to_end/test_process_mutants.py -m slow
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from types import FunctionType

import pytest
from helpers.runs import directory_of, ppo_config, reward_config, write_data, write_random_policy
from helpers.sharded import (
    assert_same,
    in_group,
    in_two,
    text_of,
    train_all,
    train_with_little_memory,
)

from rlhf.config import PeftConfig, SamplingConfig, ScorerConfig

PACKAGE = Path(__file__).parents[2] / "rlhf"
SHARE = "    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)"
SHARED = SHARE.replace("return ", "model = ") + "\n    {}\n    return model"
CLIP = "    return float(whole(clip_grad_norm_(parameters, limit)))"
KL = 17.5  # of the first rollout to the reference, about, nats per response
# bug -> run that finds it, module, passage, and what replaces it
MUTANTS = {
    "gradients are summed": (
        "ppo",
        "distributed",
        CLIP,
        "    [p.grad.mul_(2) for p in parameters if p.grad is not None]\n" + CLIP,
    ),
    "each process trains its slice on its own gradients": (
        "ppo",
        "distributed",
        SHARE,
        SHARED.format(
            "dist = torch.distributed; dist.reduce_scatter_single = dist.reduce_scatter_tensor = "
            "lambda output, input, **_: output.copy_(2 * input.view(2, -1)[dist.get_rank()])"
        ),
    ),
    "gradients are clipped by the norm of the slice": (
        "ppo",
        "distributed",
        CLIP,
        "    norm = whole(clip_grad_norm_(parameters, 1e9))\n"
        "    grads = [local(p.grad) for p in parameters if p.grad is not None]\n"
        "    own = float(torch.stack([grad.norm() for grad in grads]).norm())\n"
        "    torch._foreach_mul_(grads, min(1.0, limit / (own + 1e-6)))\n"
        "    return float(norm)",
    ),
    "adapters on one base train on the gradients of each process": (
        "shared",
        "distributed",
        '    mean = accelerator.reduce(together, reduction="mean")',
        "    mean = together",
    ),
    "processes sample for the same prompts": (
        "ppo",
        "ppo.rollout",
        "range(num_rows * accelerator.process_index, num_rows * (accelerator.process_index + 1))",
        "range(num_rows)",
    ),
    "processes read the same rows of a minibatch": (
        "ppo",
        "ppo.rollout",
        "order[process :: accelerator.num_processes] for",
        "order[0 :: accelerator.num_processes] for",
    ),
    "the copy that samples is never updated": (
        "ppo",
        "sampling.engine",
        "        if self.copy is not None and is_read:\n            copy_weights",
        "        if not vars(self).setdefault('done', []):\n            self.done.append(1)\n"
        "            copy_weights",
    ),
    "a process whose responses have ended makes no more passes": (
        "layers",
        "sampling.in_step",
        "    while _count(False, device).item():",
        "    while False:",
    ),
    "a process chooses how to sample by its own memory": (
        "auto",
        "ppo.sampler",
        "    fullest = int(shares.argmax())",
        "    fullest = accelerator.process_index",
    ),
    "a loss counts the tokens of one process": (
        "ppo",
        "ppo.update",
        "        stats: Stats = {}\n",
        "        denominator = float(batch.loss_mask[torch.cat(passes)].sum()); stats = {}\n",
    ),
    "statistics are those of one process": (
        "ppo",
        "ppo.update",
        "    everywhere = accelerator.gather(mine[None]).cpu()",
        "    everywhere = (mine[None] * accelerator.num_processes).cpu()",
    ),
    "weights are averaged on the first process alone": (
        "ppo",
        "ppo.update",
        "        if self.averages is not None and self.trains_policy(update):",
        "        if self.averages is not None and self.accelerator.is_main_process:",
    ),
    "the KL coefficient adapts to the responses of each process": (
        "ppo",
        "ppo.trainer",
        'self.kl_coef, metrics["kl"], ppo',
        "self.kl_coef, float(batch.kl[self.accelerator.process_index :: 2].sum(1).mean()), ppo",
    ),
    "an evaluation counts the rows of each process": (
        "ppo",
        "ppo.evaluation",
        "        return _with_bounds(figures)",
        "        figures = {n: x[accelerator.process_index :: 2] for n, x in figures.items()}\n"
        "        return _with_bounds(figures)",
    ),
    "the first process alone stops at target_kl": (
        "guards",
        "ppo.update",
        "            if ppo.target_kl is not None and",
        "            if self.accelerator.is_main_process and ppo.target_kl is not None and",
    ),
    "the first process alone ends at the KL budget": (
        "guards",
        "ppo.loop",
        "                over_budget = ",
        "                over_budget = self.trainer.accelerator.is_main_process and ",
    ),
    "a resumed optimiser begins anew": (
        "resumed",
        "checkpoint.state",
        "optimizer.load_state_dict(content)",
        "optimizer.load_state_dict(content | {'state': {}})",
    ),
    "a ranking loss counts the prompts of one process": (
        "reward",
        "reward.ranking_trainer",
        "loss * (share * self.accelerator.num_processes)",
        "loss * share",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that one process has made, by the names in `MUTANTS`."""
    folder = write_data(tmp_path_factory.mktemp("mutants"))
    ppo = ppo_config(folder / "one", folder, write_random_policy(folder / "policy"))
    ppo.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    ppo.ppo.reference = str(write_random_policy(folder / "reference", seed=1))
    ppo.ppo.num_updates, ppo.ppo.num_ppo_epochs = 2, 1
    ppo.ppo.kl_target, ppo.ppo.kl_horizon = KL, 50  # near it, the coefficient shows each difference
    ppo.checkpoint.every, ppo.evaluation.every, ppo.distributed_timeout = 1, 2, 60
    guards = dataclasses.replace(ppo, run_name="guards")
    guards.ppo = dataclasses.replace(ppo.ppo, num_updates=3, num_ppo_epochs=2, target_kl=1e-4)
    guards.watchdog = dataclasses.replace(ppo.watchdog, kl_budget=KL / 2)
    shared = dataclasses.replace(ppo, run_name="shared", peft=PeftConfig(enabled=True, r=4))
    shared.ppo = dataclasses.replace(ppo.ppo, reference=None, kl_target=None, share_base=True)
    layers = dataclasses.replace(ppo, run_name="layers", sampling=SamplingConfig(gather="layers"))
    layers.ppo = dataclasses.replace(ppo.ppo, rollout_batch_size=1)  # other numbers of passes
    auto = dataclasses.replace(ppo, run_name="auto")
    reward = reward_config(folder / "one", folder, folder / "policy")
    reward.peft, reward.batch_size, reward.dataset.max_length = PeftConfig(), 8, 128
    reward.trainer |= {"max_steps": 2, "logging_steps": 1, "eval_steps": 2}
    reward.trainer |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    train_all(ppo, guards, shared, layers, auto, reward)
    resumed = dataclasses.replace(ppo, run_name="resumed", resume=True)
    shutil.copytree(directory_of(ppo), directory_of(resumed))
    found = {"ppo": ppo, "guards": guards, "shared": shared, "resumed": resumed}
    return found | {"layers": layers, "auto": auto, "reward": reward}


def in_both(config, folder):
    """The same run for two processes; one that resumes has its first checkpoint."""
    again = in_two(config, runs_dir=str(folder / "two"))
    if config.resume:
        shutil.copytree(directory_of(config), directory_of(again))
        for name in ("final", "critic", "checkpoint-2"):
            shutil.rmtree(directory_of(again) / name)
    return again


def plant(module: str, old: str, new: str) -> None:
    """Give the functions of a module the code that they have after one passage is replaced."""
    found = importlib.import_module(f"rlhf.{module}")
    text = Path(str(found.__file__)).read_text()
    changed: dict = {"__name__": found.__name__}
    exec(compile(text.replace(old, new), str(found.__file__), "exec"), changed)
    for name, value in vars(found).items():
        if getattr(value, "__module__", None) != found.__name__:
            continue
        pairs = [(value, changed[name])]
        if isinstance(value, type):
            pairs = [(own, vars(changed[name]).get(key)) for key, own in vars(value).items()]
        for function, other in pairs:
            if isinstance(function, FunctionType) and isinstance(other, FunctionType):
                function.__code__ = other.__code__


def work(mutant, *configs) -> None:
    """Train with a bug, in one of the processes."""
    if mutant is not None:
        plant(*mutant)
    for config in configs:
        (train_with_little_memory if config.run_name == "auto" else train_all)(config)


@pytest.mark.parametrize("bug", MUTANTS)
def test_passage_of_each_bug_is_in_the_source_once(bug):
    _, module, old, new = MUTANTS[bug]
    text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    assert text.count(old) == 1
    compile(text.replace(old, new), module, "exec")


@pytest.mark.slow
def test_runs_without_a_bug_are_those_of_one_process(runs, tmp_path):
    both = [in_both(config, tmp_path) for config in runs.values()]
    log = tmp_path / "log"
    assert in_group(work, None, *both, log=log, seconds=900) == [0, 0], text_of(log)
    for one, two in zip(runs.values(), both, strict=True):
        assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_bug_of_several_processes_is_found(bug, runs, tmp_path):
    name, *mutant = MUTANTS[bug]
    two, log = in_both(runs[name], tmp_path), tmp_path / "log"
    codes = in_group(work, mutant, two, log=log, seconds=180)
    text = text_of(log)
    assert "NameError" not in text, text
    assert name in ("guards", "layers", "auto") or "Timed out" not in text, text
    if codes == [0, 0]:
        with pytest.raises(AssertionError) as difference:
            assert_same(runs[name], two)
        print(f"\n{bug}: {str(difference.value)[:200]}")
    else:
        print(f"\n{bug}: {text[-300:]}")
