"""What a stage saves: a model's own sampling settings, what cannot be written at the end, and
pipelines on both kinds of final directory.

Run: pytest tests/end_to_end/test_saving.py
"""

import json
import tempfile

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, write_policy
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import require_writable
from rlhf.config import DatasetConfig, InputError, ModelConfig, RewardStageConfig, SFTStageConfig
from rlhf.export import ExportOptions, export
from rlhf.metrics import read_jsonl

VICUNA = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


def write_model(directory, settings=None, config=None):
    """A tiny model whose files say how it should sample."""
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = directory / "generation_config.json"
    file.unlink()
    if settings is not None:
        file.write_text(json.dumps(settings))
    if config is not None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def sft_config(folder, model, **changes):
    rows = folder / "rows.jsonl"
    row = '{{"prompt": "Fruit {0}?", "completion": " An apple {0}."}}\n'
    rows.write_text("".join(row.format(i) for i in range(12)))
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(model)),
        dataset=DatasetConfig(str(rows), format="prompt_completion", max_length=100),
        num_samples=3,
        response_length=8,
        **changes,
    )
    config.trainer |= TRAINER
    config.dataset.eval_fraction = 0.3
    return config


def reward_config(folder, model):
    rows = folder / "ranked.jsonl"
    row = '{{"prompt": "Fruit {0}?", "responses": [" An apple.", " A car."], "ranks": [0, 1]}}\n'
    rows.write_text("".join(row.format(i) for i in range(12)))
    dataset = DatasetConfig(str(rows), format="ranked", max_length=100, eval_fraction=0.3)
    config = RewardStageConfig(
        runs_dir=str(folder / "runs"), model=ModelConfig(path=str(model)), dataset=dataset
    )
    config.trainer |= TRAINER
    return config


def saved_settings(final):
    return GenerationConfig.from_pretrained(final)


# --- A model's own sampling settings --------------------------------------------------------------


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_sampling_settings_without_do_sample_do_not_cost_the_weights(where, tmp_path, capsys):
    settings, config = (VICUNA, None) if where == "generation_config.json" else (None, VICUNA)
    model = write_model(tmp_path / "model", settings, config)
    final = train_sft(sft_config(tmp_path, model)).directory
    said = capsys.readouterr().out
    assert "set do_sample=True, which temperature=0.9, top_p=0.6 needs" in said
    kept = "saved with the model, but not used in training: do_sample=True, temperature=0.9"
    assert kept in said
    settings = saved_settings(final)
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.9, 0.6)
    assert "temperature" not in (final / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(final)


def test_sampling_settings_of_a_model_change_nothing_in_sft(tmp_path):
    results = []
    for name, settings in (("plain", None), ("own", VICUNA | {"repetition_penalty": 1.5})):
        (tmp_path / name).mkdir()
        model = write_model(tmp_path / name / "model", settings)
        result = train_sft(sft_config(tmp_path / name, model))
        stage = result.directory.parent
        results.append((result.samples, read_jsonl(stage / "metrics.jsonl")))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("given", "saved", "said"),
    [
        (
            {"do_sample": False, "temperature": 0.7},
            {"do_sample": False},
            "greedy decoding does not",
        ),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False}, "greedy decoding does not"),
        ({"early_stopping": True}, {}, "dropped early_stopping=True: transformers refuses"),
        ({"output_scores": True}, {}, "dropped output_scores=True: transformers refuses"),
        (
            {"num_beams": 2, "early_stopping": True},
            {"num_beams": 2, "early_stopping": True},
            "saved with the model",
        ),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, "saved with the model"),
    ],
)
def test_settings_that_transformers_refuses_are_dropped_and_named(given, saved, said, tmp_path):
    from rlhf.models import load_policy, mend_sampling_settings
    from rlhf.tokenizer import load_tokenizer

    config = ModelConfig(str(write_model(tmp_path / "model", given)))
    model = load_policy(config, load_tokenizer(config))
    lines = mend_sampling_settings(model)
    assert any(said in line for line in lines)
    model.generation_config.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {k: v for k, v in values.items() if k[-3:] != "_id" and k[:4] != "tran"} == saved


def test_ppo_saves_the_settings_that_it_samples_with(tmp_path, capsys):
    policy = write_policy(tmp_path / "policy")
    file = policy / "generation_config.json"
    own = {"temperature": 0.5, "top_p": 0.6, "repetition_penalty": 1.3}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    config = make_config(policy, tmp_path, num_updates=1, temperature=0.7)
    final = train_ppo(config).directory
    settings = saved_settings(final)
    assert (settings.do_sample, settings.temperature) == (True, 0.7)
    assert (settings.top_p, settings.top_k, settings.repetition_penalty) == (1.0, 0, None)
    said = capsys.readouterr().out.splitlines()[0]
    ours, _, theirs = said.partition(" instead of ")
    assert ours.endswith("temperature=0.7, top_p=1.0, top_k=0")
    assert set(theirs.split(", ")) == {"temperature=0.5", "top_p=0.6", "repetition_penalty=1.3"}


def test_export_writes_a_model_whose_settings_transformers_refuses(tmp_path):
    model = write_model(tmp_path / "model", {"temperature": 0.9})
    export(ExportOptions(str(model), str(tmp_path / "plain")))
    assert saved_settings(tmp_path / "plain").do_sample is True


# --- What cannot be written -----------------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    from helpers import tiny

    class Unwritable(type(tiny_tokenizer())):
        def save_pretrained(self, *args, **kwargs):
            raise NotImplementedError("this tokenizer has no files")

    def unwritable_tokenizer():
        tokenizer = tiny_tokenizer()
        tokenizer.__class__ = Unwritable
        return tokenizer

    monkeypatch.setattr(tiny, "unwritable_tokenizer", unwritable_tokenizer, raising=False)
    model = write_model(tmp_path / "model")
    for train, config in (
        (train_sft, sft_config(tmp_path, model)),
        (train_reward, reward_config(tmp_path, model)),
        (train_ppo, make_config(write_policy(tmp_path / "policy"), tmp_path)),
    ):
        config.model.tokenizer = "python:helpers.tiny.unwritable_tokenizer"
        with pytest.raises(InputError, match="the tokenizer could not be written into final/"):
            train(config)
    assert not (tmp_path / "runs").exists()


def test_a_config_that_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tokenizer, config = tiny_tokenizer(), SFTStageConfig(model=ModelConfig("some/model"))
    model = tiny_model("llama", tokenizer)
    require_writable(model, tokenizer, config)
    model.config.custom = object()  # as code of a model's own may leave behind
    with pytest.raises(InputError, match="^model.path=some/model: config.json could not be wri"):
        require_writable(model, tokenizer, config)
    assert not any(tmp_path.iterdir())


# --- Pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    sft = train_sft(sft_config(folder, write_model(folder / "model", VICUNA))).directory
    reward = train_reward(reward_config(folder, sft)).directory
    return sft, reward


def test_a_text_generation_pipeline_reads_the_final_directory_of_a_policy(stages):
    generator = pipeline("text-generation", model=str(stages[0]))
    torch.manual_seed(0)
    answers = {generator("Fruit 1?", max_new_tokens=8)[0]["generated_text"] for _ in range(4)}
    assert len(answers) > 1  # it samples
    greedy = generator("Fruit 1?", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    model, tokenizer = generator.model, generator.tokenizer
    ids = tokenizer("Fruit 1?", return_tensors="pt")
    expected = model.generate(**ids, do_sample=False, max_new_tokens=8)[0]
    assert greedy == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_text_classification_pipeline_gives_the_scores_of_our_scorer(stages):
    from rlhf.config import ScorerConfig
    from rlhf.scorers import load_scorer

    path = str(stages[1])
    classifier = pipeline("text-classification", model=path)
    scorer = load_scorer(ScorerConfig(path, normalize="none"), "cpu")
    prompts, responses = ["Fruit 1?", "Fruit 22?"], [" An apple.", " A car or two."]
    end = classifier.tokenizer.eos_token
    texts = [p + r + end for p, r in zip(prompts, responses, strict=True)]
    one_by_one = [classifier(text, function_to_apply="none")[0]["score"] for text in texts]
    together = [row["score"] for row in classifier(texts, function_to_apply="none", batch_size=2)]
    expected = scorer(prompts, responses)
    torch.testing.assert_close(torch.tensor(one_by_one), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(together), expected, rtol=1e-5, atol=1e-5)
