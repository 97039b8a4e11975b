"""`ppo.base=stacked`: the adapter of SFT stays apart from the base, below those of PPO. The numbers
are those of the merged base, and SFT, reward model and policy have one base by hash.

Run: python -m pytest tests/ppo/test_stacked_base.py
"""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import crashed_and_resumed, make_config, make_trainer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_share_base import LORA, write_reward
from transformers import AutoModelForCausalLM

from rlhf import train_ppo
from rlhf.checkpoint import hash_weights, make_record, read_record, write_stage
from rlhf.config import InputError, ModelConfig, PeftConfig, ScorerConfig, SFTStageConfig, check
from rlhf.metrics import read_jsonl
from rlhf.models import add_lora, load_policy, load_reward_model, merged, what_to_save
from rlhf.ppo.critic import require_same_base
from rlhf.ppo.preflight.longest_step import longest_micro_batch
from rlhf.ppo.preflight.memory import estimate_memory
from rlhf.tokenizer import load_tokenizer


def shift(model, seed):
    """Move the adapters of a model away from where they began, where they add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_sft(directory, base_dir, save="both", **settings):
    """The result of SFT with LoRA."""
    config = SFTStageConfig(model=ModelConfig(path=str(base_dir)))
    config.peft = PeftConfig(enabled=True, r=2, save=save, **settings)
    tokenizer = load_tokenizer(config.model)
    model = add_lora(load_policy(config.model, tokenizer), config.peft, "CAUSAL_LM", 1)
    shift(model, 3)
    record = make_record("sft", config, str(base_dir), tokenizer)
    plain, write = what_to_save(model, config.peft, str(base_dir))
    write_stage(directory, plain, tokenizer, config, record, write_adapter=write)
    return directory


@pytest.fixture(scope="module")
def sft_dir(policy_dir, tmp_path_factory):
    return write_sft(tmp_path_factory.mktemp("run") / "sft/final", policy_dir)


@pytest.fixture(scope="module")
def reward_dir(policy_dir, tmp_path_factory):
    """A reward model whose base is that of SFT."""
    return write_reward(tmp_path_factory.mktemp("run") / "reward/final", policy_dir)


def stacked(sft_dir, folder, reward=None, base="stacked", **ppo):
    config = make_config(sft_dir, folder, share_base=True, base=base, **ppo)
    config.peft = LORA
    if reward is not None:
        config.scorer = ScorerConfig(reward, "standardise")
    return config


# --- The numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_gradients_are_those_of_the_merged_base(family, tmp_path):
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    tiny_model(family, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sft = write_sft(tmp_path / "sft/final", base)
    one = load_policy(ModelConfig(path=str(base)), tokenizer, stacked=sft / "adapter")
    two = load_policy(ModelConfig(path=str(sft)), tokenizer)
    ids = torch.randint(10, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs, gradients = [], []
    for model in (one, two):
        model = add_lora(model, LORA, "CAUSAL_LM", 5).eval().double()
        shift(model, 7)
        logits = model(ids).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        outputs.append(logits.detach().float())
        gradients.append({name: p.grad for name, p in trained.items()})
        with model.disable_adapter():
            outputs.append(model(ids).logits.detach().float())
        outputs.append(merged(model).float().eval()(ids).logits.detach())
    close = {"rtol": 0, "atol": 1e-5 * float(outputs[0].abs().max())}  # of the largest logit
    for ours, theirs in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(outputs[0], outputs[2], **close)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2  # the policy's own adapter
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    close = {"rtol": 0, "atol": 1e-5 * largest}
    torch.testing.assert_close(gradients[0], gradients[1], **close)


def test_a_run_has_the_numbers_of_one_on_the_merged_base(sft_dir, tmp_path):
    metrics, reward = [], write_reward(tmp_path / "reward/final", sft_dir)  # on SFT's result
    for base in ("stacked", "merged"):
        trainer = make_trainer(stacked(sft_dir, tmp_path, reward, base), tmp_path)
        metrics.append([trainer.step() for _ in range(2)])
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys() and one["score_std"] > 0
        for name, value in one.items():
            rounding = 1e-4 if name.startswith("sampler_gap") else 1e-5
            if name == "kl":  # the log-ratios of all tokens of a response, summed
                rounding *= one["response_length"]
            assert value == pytest.approx(two[name], rel=1e-4, abs=rounding), name
    assert metrics[0][-1]["kl"] != 0


# --- One base by hash -----------------------------------------------------------------------------


def test_the_reward_model_may_be_on_the_base_that_sft_started_from(
    policy_dir, sft_dir, reward_dir, tmp_path
):
    config = stacked(sft_dir, tmp_path, reward_dir)
    config.critic.init = "reward"
    require_same_base(config)
    assert read_record(reward_dir).parent_weights == read_record(sft_dir).parent_weights
    assert read_record(sft_dir).parent_weights == hash_weights(policy_dir)
    trainer = make_trainer(config, tmp_path)
    actors = trainer.actors
    apart = load_reward_model(ModelConfig(path=reward_dir)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        score = (apart(ids).logits - 0.5) / 2.0  # standardised
        for model in (actors.scorer.model, actors.critic):
            found = model(ids, ids > 0)[:, -1:]
            torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-5)
    models = (actors.policy, actors.critic, actors.scorer.model)
    own = [{p.data_ptr() for p in model.parameters()} for model in models]
    backbone = {
        n for n, _ in load_policy(config.model, actors.tokenizer).base_model.named_parameters()
    }
    factors = [n for n, _ in actors.policy.named_parameters() if "stacked_" in n]
    assert len(own[0] & own[1] & own[2]) == len(backbone) + len(factors) > 20
    config.ppo.base = "merged"
    with pytest.raises(InputError, match="is an adapter on"):
        require_same_base(config)


def test_only_the_adapters_of_policy_and_critic_train_and_the_estimate_counts_sfts(
    sft_dir, reward_dir, tmp_path
):
    trainer = make_trainer(stacked(sft_dir, tmp_path, reward_dir), tmp_path)
    actors = trainer.actors
    models = {"policy": actors.policy, "critic": actors.critic, "reward": actors.scorer.model}
    before = {
        (model, name): parameter.clone()
        for model, module in models.items()
        for name, parameter in module.named_parameters()
    }
    tensors = {p.data_ptr(): p for m in models.values() for p in m.parameters()}.values()
    estimate = estimate_memory(trainer, longest_micro_batch(trainer))
    assert estimate.sum("weights") == sum(p.nbytes for p in tensors)
    assert any("stacked_up" in name for _, name in before)
    trainer.step()
    changed = {
        (model, name)
        for (model, name), old in before.items()
        if not torch.equal(old, models[model].get_parameter(name))
    }
    assert {model for model, _ in changed} == {"policy", "critic"}
    assert all("lora_" in name or "score.modules_to_save" in name for _, name in changed)


# --- What a run leaves behind ---------------------------------------------------------------------


def test_a_run_saves_a_merged_model_and_resumes_to_the_same_bits(
    policy_dir, sft_dir, reward_dir, tmp_path, monkeypatch, capsys
):
    def config():
        config = stacked(sft_dir, tmp_path, reward_dir, num_ppo_epochs=1, response_length=6)
        config.critic.init, config.evaluation.num_prompts = "reward", 0
        return config

    whole = train_ppo(config())
    said = capsys.readouterr()
    assert f"; the adapter of {sft_dir} stays apart from the base" in said.out
    assert "may misjudge" not in said.err  # the reward model is from the base of SFT, on purpose
    final = whole.directory
    plain = AutoModelForCausalLM.from_pretrained(final)
    on_sft = AutoModelForCausalLM.from_pretrained(sft_dir)
    adapted = PeftModel.from_pretrained(on_sft, final / "adapter").merge_and_unload()
    weights, theirs = plain.state_dict(), adapted.state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert read_record(final).parent == str(sft_dir)
    assert read_record(whole.stage_dir / "critic").parent == str(policy_dir)
    resumed = crashed_and_resumed(config(), monkeypatch)
    for file in ("final/model.safetensors", "critic/adapter/adapter_model.safetensors"):
        one, two = (load_file(run.stage_dir / file) for run in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    rows = [read_jsonl(run.stage_dir / "metrics.jsonl") for run in (whole, resumed)]
    assert rows[0] == rows[1]


def test_the_adapter_alone_is_enough(policy_dir, tmp_path):
    alone = write_sft(tmp_path / "sft/final", policy_dir, save="adapter")
    config = stacked(alone, tmp_path)
    require_same_base(config)
    trainer = make_trainer(config, tmp_path)
    assert any("stacked_up" in name for name, _ in trainer.actors.policy.named_parameters())


# --- Refused --------------------------------------------------------------------------------------


def test_what_cannot_stay_apart_is_refused(policy_dir, sft_dir, tmp_path):
    with pytest.raises(InputError, match="ppo.base=stacked: model.path=.* holds no adapter"):
        require_same_base(stacked(policy_dir, tmp_path))
    config = stacked(sft_dir, tmp_path)
    config.ppo.share_base = False
    with pytest.raises(InputError, match="set ppo.share_base=true"):
        check(config)


def test_an_adapter_that_is_more_than_two_factors_is_refused(policy_dir, sft_dir, tmp_path):
    config, tokenizer = ModelConfig(path=str(policy_dir)), tiny_tokenizer()
    model = add_lora(load_policy(config, tokenizer), LORA, "CAUSAL_LM", 1, [5])
    model.save_pretrained(tmp_path / "rows")
    with pytest.raises(InputError, match="trains model.embed_tokens itself.*set ppo.base=merged"):
        load_policy(config, tokenizer, stacked=tmp_path / "rows")
    shutil.copytree(sft_dir / "adapter", tmp_path / "dora")
    settings = tmp_path / "dora/adapter_config.json"
    settings.write_text(settings.read_text().replace('"use_dora": false', '"use_dora": true'))
    tensors = load_file(tmp_path / "dora/adapter_model.safetensors")
    for name, up in list(tensors.items()):
        if "lora_B" in name:
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(up))
    save_file(tensors, tmp_path / "dora/adapter_model.safetensors")
    with pytest.raises(InputError, match="more than a product of two factors"):
        load_policy(config, tokenizer, stacked=tmp_path / "dora")


def test_a_base_that_changed_since_sft_is_refused(policy_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(policy_dir, base)
    sft = write_sft(tmp_path / "sft/final", base)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="but now the base of its adapter is .*base \\(weights"):
        require_same_base(stacked(sft, tmp_path))
