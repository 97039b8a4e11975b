"""Every stage of every recipe, on a tiny model of the recipe's family with rows of its format.

The stages of a recipe follow each other in one run, as its comments show them; only sizes, lengths
and learning rates are made small. Run: python -m pytest tests/recipes/test_recipe_runs.py
"""

import json
import math

import pytest
from helpers.configs import compose_stage
from helpers.recipe_facts import FACTS
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import read_record
from rlhf.config import CONF_DIR
from rlhf.data import encode_row, resolve_format
from rlhf.metrics import read_jsonl
from rlhf.tokenizer import chat_template_text

# recipe -> family of its model, of `tiny.FAMILIES`
FAMILY = {
    "alpaca": "llama",
    "alpaca_farm": "llama",
    "alpaca_lora": "llama",
    "baize": "llama",
    "chatllama": "opt",
    "dolly_v1": "gptj",
    "dolly_v2": "gpt_neox",
    "falcon_instruct": "falcon_7b",
    "hh": "gpt_neox",
    "instructgpt": "gpt2",
    "llama2_chat": "llama",
    "tldr": "gpt_neox",
    "vicuna": "llama",
}
# recipe -> the text with loss of row 1 of its SFT data
LABELLED = {
    "alpaca": "A pear.<eos>",
    "alpaca_farm": "A pear.<eos>",
    "alpaca_lora": (
        "<bos>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName fruit 1.\n\n### Input:\nin winter\n\n### Response:\nA pear.<eos>"
    ),
    "baize": (
        "<bos>The conversation between human and AI assistant.\n[|Human|] Name fruit 1.\n"
        "[|AI|] A pear.\n[|Human|] Thanks!\n[|AI|] Bye.\n[|Human|]"
    ),
    "chatllama": "A pear.<eos>",
    "dolly_v1": "A pear.\n\n### End",
    "dolly_v2": "A pear.\n\n### End",
    "falcon_instruct": (
        "<bos>User: Name fruit 1.\n\nAssistant: A pear.\n\nUser: Thanks!\n\nAssistant: Bye.\n\nUser"
    ),
    "hh": " A pear.<eos>",
    "instructgpt": "A pear.<eos>",
    "llama2_chat": " A pear. <eos>",
    "tldr": " Cat eats pear.<eos>",
    "vicuna": " A pear.<eos> You too, 1!<eos>",
}
FRUITS = "apple pear plum fig date lime kiwi peach melon grape".split()


def fruit(i):
    return FRUITS[i % len(FRUITS)]


def preference(i):
    """A good and a bad answer, in the order that the row's number says."""
    good, bad = f"A {fruit(i)}.", "I do not know that."
    return good, bad


def dialogue(i, answer):
    return f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: Name fruit {i}\n\nAssistant: {answer}"


def post(i):
    return {"subreddit": "Pets", "title": f"Cat {i}", "post": f"My cat {i} eats a {fruit(i)}."}


def row_of(dataset_format, i):
    """Row `i` of a format, as its source documents it."""
    question = f"Name fruit {i}."
    good, bad = preference(i)
    turns = [("human", question), ("gpt", good), ("human", "Thanks!"), ("gpt", f"You too, {i}!")]
    transcript = f"[|Human|] {question}\n[|AI|] {good}\n[|Human|] Thanks!\n[|AI|] Bye.\n[|Human|] "
    return {
        "alpaca": {"instruction": question, "input": "in winter" * (i % 2), "output": good},
        "alpaca_farm": {
            "instruction": question,
            "input": "",
            "output_1": good,
            "output_2": bad,
            "preference": 1,
        },
        "baize": {
            "topic": question,
            "input": f"The conversation between human and AI assistant.\n{transcript}",
        },
        "chatllama_actor": {"user_input": question, "completion": good},
        "chatllama_reward": {
            "user_input": f"Name fruit {i // 2}.",
            "completion": bad if i % 2 else good,
            "score": 0.0 if i % 2 else 4.5,
        },
        "chatllama_rlhf": {"user_input": question},
        "dolly15k": {
            "instruction": question,
            "context": "It is winter." * (i % 2),
            "response": good,
            "category": "open_qa",
        },
        "hh": {"chosen": dialogue(i, good), "rejected": dialogue(i, bad)},
        "hh_chosen": {"chosen": dialogue(i, good), "rejected": dialogue(i, bad)},
        "messages": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": good},
            ]
        },
        "pair": {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
            "margin": (1, 2 / 3, 1 / 3, 0)[i % 4],
        },
        "prompt_completion": {"prompt": f"{question}\n", "completion": good},
        "ranked": {
            "prompt": f"{question}\n",
            "responses": [bad, good, f"{good} It is sweet.", "No."],
            "ranks": [2, 1, 0, 2],
        },
        "sharegpt": {
            "id": str(i),
            "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        },
        "summarize_from_feedback": {
            "info": post(i),
            "summaries": [{"text": bad}, {"text": good}],
            "choice": 1,
        },
        "text": {"text": f"Fruit number {i} of the list is the {fruit(i)}."},
        "tldr": {**post(i), "summary": f"Cat eats {fruit(i)}."},
    }[dataset_format]


def write_rows(folder, dataset_format, count=24):
    file = folder / f"{dataset_format}.jsonl"
    file.write_text("".join(f"{json.dumps(row_of(dataset_format, i))}\n" for i in range(count)))
    return file


# --- The stages ---------------------------------------------------------------------------------

SMALL = {
    "sft": [
        "num_samples=2",
        "response_length=8",
        "trainer.num_train_epochs=4",
        "trainer.max_steps=12",
        "trainer.learning_rate=1e-2",
        "trainer.warmup_steps=0",
        "trainer.per_device_train_batch_size=4",
        "batch_size=8",
        "trainer.logging_steps=1",
        "trainer.eval_steps=6",
        "checkpoint.every=6",
    ],
    "reward": [
        "trainer.num_train_epochs=2",
        "trainer.learning_rate=1e-2",
        "trainer.warmup_steps=0",
        "trainer.per_device_train_batch_size=4",
        "batch_size=8",
        "trainer.logging_steps=1",
    ],
    "ppo": [
        "ppo.num_updates=2",
        "ppo.batch_size=8",
        "ppo.num_mini_batches=2",
        "ppo.rollout_batch_size=8",
        "ppo.micro_batch_size=8",
        "ppo.response_length=8",
        "evaluation.num_prompts=4",
        "evaluation.every=2",
        "preflight=false",
    ],
}


def stages_of(recipe):
    return [stage for stage in ("sft", "reward", "ppo") if (recipe, stage) in FACTS]


def tiny_checkpoint(folder, family):
    """A model directory of the family, with room for the longest rows of any recipe."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, tokenizer, max_position_embeddings=4096)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compose_small(recipe, stage, folder, *overrides):
    """The recipe as a user composes it, on rows of its own format, made small."""
    dataset_format = compose_stage(stage, f"recipe={recipe}").dataset.format
    return compose_stage(
        stage,
        f"recipe={recipe}",
        f"runs_dir={folder}/runs",
        f"dataset.path={write_rows(folder, dataset_format)}",
        "dataset.eval_path=null",
        "dataset.eval_fraction=0.2",
        *SMALL[stage],
        *overrides,
    )


def run_sft(recipe, folder):
    overrides = [f"model.path={tiny_checkpoint(folder / 'base', FAMILY[recipe])}"]
    if recipe == "falcon_instruct":
        overrides.append(f"mix.path={write_rows(folder, 'text')}")
    if recipe.startswith("dolly"):
        overrides.append("model.pad_token='<pad>'")  # <|endoftext|> is no token of the tiny one
    config = compose_small(recipe, "sft", folder, *overrides)
    result = train_sft(config)
    rows = read_jsonl(result.directory.parent / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5, losses
    assert math.isfinite(result.after["eval_loss"])
    reloaded = AutoModelForCausalLM.from_pretrained(result.directory)
    assert reloaded.config.model_type == FAMILIES[FAMILY[recipe]][0]
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    if config.model.chat_template is not None:
        assert tokenizer.chat_template == chat_template_text(config.model.chat_template)
    row = resolve_format(config.dataset.format)(row_of(config.dataset.format, 1))
    labels = [x for x in encode_row(row, tokenizer, config.train_on_prompt)[1] if x != -100]
    assert tokenizer.decode(labels, clean_up_tokenization_spaces=False) == LABELLED[recipe]
    return result.directory


def run_reward(recipe, folder, *overrides):
    normalization = compose_stage("reward", f"recipe={recipe}").normalization
    if normalization.completions == "demonstrations":
        rows = write_rows(folder, normalization.format)
        overrides = [*overrides, f"normalization.path={rows}"]
    result = train_reward(compose_small(recipe, "reward", folder, *overrides))
    assert math.isfinite(result.after["eval_accuracy"])
    model = AutoModelForSequenceClassification.from_pretrained(result.directory)
    assert model.config.model_type == FAMILIES[FAMILY[recipe]][0] and model.config.num_labels == 1
    return result.directory


def run_ppo(recipe, folder):
    overrides = []
    if recipe == "instructgpt":
        overrides = [f"ptx.path={write_rows(folder, 'text')}", "ptx.batch_size=16"]
    if recipe == "llama2_chat":  # the second reward model, as the recipe's comment has it
        sft = folder / "runs/llama2_chat/sft/final"
        run_reward(recipe, folder, "run_name=llama2_chat_safety", f"model.path={sft}")
    result = train_ppo(compose_small(recipe, "ppo", folder, *overrides))
    rows = read_jsonl(result.directory.parent / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 2
    assert all(math.isfinite(row["policy_loss"]) for row in rows if "policy_loss" in row)
    AutoModelForCausalLM.from_pretrained(result.directory)
    return result.directory


# Between them: LoRA, stop strings, text mixed in, demonstrations, PPO-ptx, two reward models.
BY_DEFAULT = {"alpaca_lora", "dolly_v2", "falcon_instruct", "hh", "instructgpt"}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILY],
)
def test_every_stage_of_a_recipe_runs(recipe, tmp_path):
    runs = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
    parent = None
    for stage in stages_of(recipe):
        directory = runs[stage](recipe, tmp_path)
        assert directory == tmp_path / "runs" / recipe / stage / "final"
        record = read_record(directory)
        assert record.stage == stage
        assert parent is None or record.parent == str(parent)
        parent = tmp_path / "runs" / recipe / "sft" / "final"


def test_these_tables_cover_every_recipe():
    recipes = {recipe for recipe, _ in FACTS}
    assert set(FAMILY) == set(LABELLED) == recipes
    assert {file.stem for file in (CONF_DIR / "recipe").glob("*.yaml")} == recipes | {"demo"}
