"""What a LoRA run leaves behind: merged weights, the adapter, or both; all of it can be used.

The base is stored in bfloat16, as models on the Hub are.
Run: python -m pytest tests/end_to_end/test_kept_adapters.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.stages import ppo_config, reward_config, sft_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from rlhf import train_ppo, train_reward, train_sft
from rlhf.chat import Chat, ChatOptions
from rlhf.checkpoint import read_record
from rlhf.config import CriticConfig, InputError, ModelConfig, PeftConfig, ScorerConfig
from rlhf.export import ExportOptions, export
from rlhf.generate import GenerateOptions
from rlhf.generate import run as generate_file
from rlhf.models import add_lora, load_policy, load_reward_model, what_to_save
from rlhf.scorers import load_scorer
from rlhf.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
PROMPT = [{"role": "user", "content": "name three animals"}]
STAGES = ("sft", "reward", "ppo")


def train_all(folder, base, save):
    """Two steps of each stage with LoRA on the base; return the run's directory."""
    peft = PeftConfig(enabled=True, r=4, save=save)
    sft = sft_config(folder, run_name=save, peft=peft, model=ModelConfig(path=str(base)))
    reward = reward_config(folder, run_name=save, peft=peft)
    for config in (sft, reward):
        config.trainer |= {"max_steps": 2, "learning_rate": 0.02}
    train_sft(sft)
    train_reward(reward)
    ppo = ppo_config(folder, run_name=save, peft=peft)
    ppo.ppo.num_updates = 1
    ppo.ppo.ema_decay = 0.5  # final/ has the averages of the adapters too
    train_ppo(ppo)
    return folder / save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A policy in bfloat16 that no stage of ours wrote."""
    folder = tmp_path_factory.mktemp("base")
    train_sft(sft_config(folder))
    final = folder / "run/sft/final"
    AutoModelForCausalLM.from_pretrained(final, dtype=torch.bfloat16).save_pretrained(final)
    (final / "rlhf.json").unlink()
    return final


@pytest.fixture(scope="module")
def both(base, tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("both"), base, "both")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("alone"), base, "adapter")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def policy(path):
    config = ModelConfig(path=str(path))
    return load_policy(config, load_tokenizer(config))


# --- peft.save=both -----------------------------------------------------------------------------


def test_peft_loads_the_adapter_on_the_base_and_gives_the_trained_policy(base, both):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    adapted = PeftModel.from_pretrained(plain, both / "sft/final/adapter")
    assert (logits(adapted) - before).abs().max() > 0.1
    exact = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(both / "sft/final/model.safetensors").items():
        torch.testing.assert_close(tensor, exact[name].to(torch.bfloat16), rtol=0, atol=0)


def test_peft_loads_the_adapter_of_a_reward_model_with_its_head(both):
    final = both / "reward/final"
    factory = AutoModelForSequenceClassification.from_pretrained
    plain = factory(both / "sft/final", num_labels=1, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, final / "adapter")
    assert torch.equal(
        adapted.get_base_model().score.weight,
        load_file(final / "model.safetensors")["score.weight"],
    )
    assert adapted.peft_config["default"].base_model_name_or_path == str(both / "sft/final")


def test_merged_weights_have_the_type_of_the_base_and_a_head_stays_float32(base, both):
    for folder in ("sft/final", "reward/final", "ppo/final", "ppo/critic"):
        tensors = load_file(both / folder / "model.safetensors")
        types = {t.dtype for name, t in tensors.items() if name != "score.weight"}
        assert types == {torch.bfloat16}
        assert "score.weight" not in tensors or tensors["score.weight"].dtype == torch.float32
        assert read_record(both / folder).dtype == "bfloat16"


def test_a_final_directory_is_hardly_larger_than_its_base(base, both):
    def size(folder):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    for folder in ("sft/final", "ppo/final"):
        names = {str(p.relative_to(both / folder)) for p in (both / folder).rglob("*.safetensors")}
        assert names == {"model.safetensors", "adapter/adapter_model.safetensors"}
        assert size(both / folder) == size(base)
        record = read_record(both / folder)
        assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= {
            *record.files
        }


@pytest.mark.parametrize(("save", "has_base"), [("merged", True), ("both", False)])
def test_no_adapter_is_kept_if_none_is_asked_for_or_its_base_is_in_no_file(save, has_base, base):
    config = PeftConfig(enabled=True, r=4, save=save)
    adapted = add_lora(policy(base), config, "CAUSAL_LM", seed=0)
    model, write = what_to_save(adapted, config, str(base) if has_base else None)
    assert write is None and not isinstance(model, PeftModel)


# --- peft.save=adapter --------------------------------------------------------------------------


def test_an_adapter_alone_goes_through_all_stages_as_the_merged_model_does(both, alone):
    for stage in STAGES:
        names = {file.name for file in (alone / stage / "final").rglob("*.safetensors")}
        assert names == {"adapter_model.safetensors"}
    merged, adapter = policy(both / "sft/final"), policy(alone / "sft/final")
    torch.testing.assert_close(logits(adapter), logits(merged), rtol=0.05, atol=0.05)
    assert (alone / "ppo/critic/adapter_model.safetensors").is_file()


def test_an_adapter_alone_samples_as_ppo_did(alone):
    settings = policy(alone / "ppo/final").generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 1.0, 0)


def test_a_reward_adapter_alone_scores_as_the_merged_reward_model(both, alone):
    scores = []
    for run in (both, alone):
        scorer = load_scorer(ScorerConfig(path=str(run / "reward/final"), normalize="none"))
        scores.append(scorer([PROMPT] * 2, ["dog cat .", "red dog wolf ."]))
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.05)
    assert (scores[0][0] - scores[0][1]).abs() > 0.1


def test_an_adapter_alone_answers_scores_and_is_exported(alone, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    answers = tmp_path / "answers.jsonl"
    options = GenerateOptions(
        path=str(alone / "ppo/final"),
        prompts=str(tmp_path / "prompts.jsonl"),
        out=str(answers),
        samples_per_prompt=2,
        best_of=str(alone / "reward/final"),
        response_length=8,
    )
    generate_file(options)
    row = json.loads(answers.read_text())
    assert row["response"] and isinstance(row["best_of_score"], float)
    export(ExportOptions(path=str(alone / "ppo/final"), out=str(tmp_path / "plain")))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    expected = logits(policy(alone / "ppo/final"))
    torch.testing.assert_close(logits(plain).float(), expected, rtol=0.05, atol=0.05)


def test_export_gives_the_adapter_that_a_run_with_adapters_alone_leaves(both, alone, tmp_path):
    for stage in STAGES:
        for run in (both, alone):
            out, final = tmp_path / f"{run.name}-{stage}", run / stage / "final"
            export(ExportOptions(path=str(final), out=str(out), format="adapter"))
            where = final / "adapter" if run is both else final
            ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (out, where))
            assert ours.keys() == theirs.keys() and all(
                torch.equal(ours[n], theirs[n]) for n in ours
            )
            assert [file.name for file in out.rglob("*.safetensors")] == [
                "adapter_model.safetensors"
            ]
            record, known = read_record(out), read_record(final)
            assert record.parent_weights == known.parent_weights
            assert (record.score_mean, record.score_std) == (known.score_mean, known.score_std)
    torch.testing.assert_close(
        logits(policy(tmp_path / "both-ppo")),
        logits(policy(both / "ppo/final")),
        rtol=0.05,
        atol=0.05,
    )
    scorers = [
        load_scorer(ScorerConfig(path=str(path), normalize="none"))
        for path in (tmp_path / "both-reward", both / "reward/final")
    ]
    scores = [scorer([PROMPT] * 2, ["dog cat .", "red dog wolf ."]) for scorer in scorers]
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_export_gives_the_adapter_of_a_checkpoint(stage, both, tmp_path):
    newest = max((both / stage).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for kind in ("adapter", "safetensors"):
        export(ExportOptions(path=str(newest), out=str(tmp_path / kind), format=kind))
    found = logits(policy(tmp_path / "adapter"))
    expected = logits(policy(tmp_path / "safetensors"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_export_of_an_adapter_that_is_not_there_is_refused(both, tmp_path):
    base, out = tmp_path / "merged", str(tmp_path / "out")
    export(ExportOptions(path=str(both / "sft/final"), out=str(base)))
    with pytest.raises(InputError, match="holds no adapter; leave out format=adapter, or train"):
        export(ExportOptions(path=str(base), out=out, format="adapter"))
    with pytest.raises(InputError, match="^dtype=float16 is for merged weights; leave it out"):
        export(ExportOptions(path=str(base), out=out, format="adapter", dtype="float16"))


def test_a_run_starts_from_the_adapter_of_a_critic(alone, tmp_path):
    critic = alone / "ppo/critic"
    config = ppo_config(tmp_path, critic=CriticConfig(init=str(critic)))
    config.model.path = str(alone / "sft/final")
    config.scorer.path = str(alone / "reward/final")
    config.ppo.num_updates = 1
    train_ppo(config)
    head = load_reward_model(ModelConfig(path=str(critic))).score.weight
    assert head.dtype == torch.float32


def test_a_base_that_has_changed_or_gone_is_refused_with_the_fix(base, alone, tmp_path):
    final, copy = tmp_path / "final", tmp_path / "base"
    shutil.copytree(alone / "sft/final", final)
    shutil.copytree(base, copy)
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)  # also from another folder
    settings["base_model_name_or_path"] = str(copy)
    (final / "adapter_config.json").write_text(json.dumps(settings))
    config = sft_config(tmp_path, model=ModelConfig(path=str(final)))
    config.trainer |= {"max_steps": 1}
    train_sft(config)  # an equal copy of the base is as good
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.get_input_embeddings().weight.data[0, 0] += 1
    model.save_pretrained(copy)
    again = dataclasses.replace(config, run_name="again")
    with pytest.raises(InputError, match="is an adapter on .* set base_model_name_or_path in"):
        train_sft(again)
    shutil.rmtree(copy)
    with pytest.raises(InputError, match="correct .*adapter_config.json: base_model_name_or_path="):
        train_sft(again)


# --- transformers.pipeline ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, folder",
    [
        ("full", "."),
        ("both", "sft/final"),
        ("both", "ppo/final"),
        ("alone", "sft/final"),  # on a whole model; transformers loads no adapter on an adapter
    ],
)
def test_a_pipeline_of_transformers_answers_as_rlhf_does(kind, folder, base, both, alone):
    path = {"full": base, "both": both, "alone": alone}[kind] / folder
    pipe = pipeline("text-generation", model=str(path), device="cpu")
    question = {"role": "user", "content": "name three animals that are red"}
    found = pipe([question], max_new_tokens=8, do_sample=False)[0]["generated_text"]
    chat = Chat(ChatOptions(path=str(path), temperature=0, response_length=8, device="cpu"))
    answer = "".join(chat.ask(question["content"], 0))
    assert found == [question, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("folder", ["reward/final", "ppo/critic"])
def test_a_pipeline_of_transformers_scores_as_rlhf_does(folder, both):
    path = str(both / folder)
    config = ModelConfig(path=path, dtype="auto")
    tokenizer = load_tokenizer(config)
    texts = [
        tokenizer.apply_chat_template(
            [*PROMPT, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in ("dog cat .", "red dog wolf .")
    ]
    pipe = pipeline("text-classification", model=path, device="cpu", function_to_apply="none")
    found = [one["score"] for one in pipe(texts, batch_size=2)]
    ids = [tokenizer(text, return_tensors="pt") for text in texts]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = [model(**one).logits.item() for one in ids]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5) and found[0] != found[1]
    if folder == "reward/final":
        scorer = load_scorer(ScorerConfig(path=path, normalize="none"))
        scores = scorer([PROMPT] * 2, ["dog cat .", "red dog wolf ."])
        assert found == pytest.approx(scores.tolist(), rel=0.05, abs=0.05)
