"""`transformers serve` on a stage directory: its answer is what transformers generates there.

Needs `pip install transformers[serving]`.
Run: python -m pytest -m slow tests/commands/test_serve.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from helpers.ports import held_port
from helpers.tiny import tiny_model, tiny_tokenizer
from huggingface_hub import InferenceClient
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import EndpointConfig, ScorerConfig, StageConfig
from rlhf.scorers import load_scorer
from rlhf.tokenizer import chat_template_text

pytestmark = [
    pytest.mark.slow,  # what a served model is asked and answers: tests/scorers/test_judge.py
    pytest.mark.skipif(
        not is_serve_available(), reason="needs fastapi, uvicorn, openai: transformers[serving]"
    ),
]
QUESTION = {"role": "user", "content": "Name a fruit."}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "Another one."},
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "sft" / "final"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    model = tiny_model("llama", tokenizer)
    record = make_record("sft", StageConfig(), None, tokenizer, "conversation")
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return directory


@pytest.fixture(scope="module")
def server(stage, tmp_path_factory):
    """Address of a server on a free port; it is killed at the end, whatever happens."""
    with held_port() as port:
        yield from served(stage, port, tmp_path_factory.mktemp("server"))


def served(stage, port, folder):
    address, log = f"http://127.0.0.1:{port}", folder / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", stage, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | home
        )
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.kill()
        process.wait()


def wait_for(address, process, log, timeout=300.0):
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{address}/health", timeout=60.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@torch.no_grad()
def greedy(stage, messages, num_tokens):
    """What transformers generates after the rendered prompt."""
    tokenizer = AutoTokenizer.from_pretrained(stage)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(stage)
    output = model.generate(ids, do_sample=False, max_new_tokens=num_tokens)[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("messages", [[QUESTION], DIALOGUE], ids=["question", "dialogue"])
def test_served_answer_is_the_greedy_one_of_transformers(messages, stage, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = InferenceClient(base_url=f"{server}/v1", timeout=300.0)
    expected = greedy(stage, messages, 24)
    assert len(set(expected)) > 5
    asked = {"model": str(stage), "max_tokens": 24, "temperature": 0.0}
    answer = client.chat_completion(messages, **asked)
    assert answer.choices[0].message.content == expected
    pieces = client.chat_completion(messages, **asked, stream=True)
    contents = [piece.choices[0].delta.content or "" for piece in pieces]
    # a character that stays incomplete at the very end is not streamed by them
    assert "".join(contents).rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_a_served_model_judges_by_its_greedy_answer(stage, server, tmp_path):
    rubric = tmp_path / "short.yaml"
    rubric.write_text(
        "version: 1\nrate: '{{ prompt }} {{ response }}'\ncompare: '{{ a }} {{ b }}'\n"
    )
    endpoint = EndpointConfig(
        model=str(stage), url=f"{server}/v1", max_tokens=8, cache=str(tmp_path / "answers")
    )
    endpoint.max_unreadable = 1.0  # a random model gives no verdict
    judge = load_scorer(ScorerConfig(f"judge:{rubric}", endpoint=endpoint))
    assert judge(["Name a fruit."], ["An apple."]).tolist() == [1.0]
    (answer,) = judge.answers(["Name a fruit. An apple."])
    question = {"role": "user", "content": "Name a fruit. An apple."}
    assert answer == greedy(stage, [question], 8)
    assert (judge.num_asked, judge.num_known, judge.num_unreadable) == (1, 1, 1)
    assert min(judge.tokens) > 0
