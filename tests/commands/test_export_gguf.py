"""`rlhf.export format=gguf`: a stub in place of llama.cpp's converter; slow: the real one.

Run: python -m pytest tests/commands/test_export_gguf.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.llama_cpp import find_cyllama, find_llama_cpp, greedy
from helpers.rows import SHARED
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tokenizers import llama, pythia
from transformers import AutoModelForCausalLM

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import StageConfig
from rlhf.export import ExportOptions, export
from rlhf.option_parser import run_command
from rlhf.tokenizer import chat_template_text

STUB = """
import pathlib, sys
if "bf16" in sys.argv:
    sys.exit("\\nNotImplementedError: BPE pre-tokenizer was not recognized\\n")
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(
    " ".join(sys.argv[4:]) + pathlib.Path(sys.argv[1], "config.json").read_text())
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def policy(folder: str, family: str, tokenizer=None, **settings) -> str:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("falcon")  # it declares a stop string
    record = make_record("sft", StageConfig(), None, tokenizer, "conversation")
    model = tiny_model(family, tokenizer, **settings)
    write_stage(Path(folder), model, tokenizer, StageConfig(), record)
    return folder


@pytest.fixture
def command(capsys):
    def run_it(*arguments):
        status = run_command("", ExportOptions, export, arguments)
        return status, *capsys.readouterr()

    return run_it


@pytest.fixture
def stub() -> str:
    Path("llama.cpp").mkdir()
    Path("llama.cpp/convert_hf_to_gguf.py").write_text(STUB)
    return "llama_cpp=llama.cpp"


def test_the_converter_gets_the_model_and_stop_strings_are_said(command, stub):
    path = policy("final", "gpt_neox")
    arguments = [f"path={path}", "format=gguf", stub]
    status, output, errors = command(*arguments, "out=policy.gguf", "dtype=float16")
    assert status == 0, errors
    assert "saved policy.gguf: GPTNeoXForCausalLM, " in output
    assert "  llama-cli -m policy.gguf --jinja -r $'\\nUser'\n" in output
    assert '(requests need "stop": ["\\nUser"])' in output
    options, _, config = Path("policy.gguf").read_text().partition("{")
    assert options.startswith("--outtype f16 --model-name policy")
    assert '"rotary_pct": 0.25' in config and "model_type" not in config
    status, _, errors = command(*arguments, "out=other.gguf", "dtype=bfloat16")
    assert status == 2 and "refuses the model" in errors and "BPE pre-tokenizer" in errors
    assert sorted(p.name for p in Path().iterdir()) == ["final", "llama.cpp", "policy.gguf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=a.gguf", "format=gguf"], "format=gguf needs llama.cpp's converter: git clone"),
        (["out=a.gguf", "format=gguf", "llama_cpp=here"], "llama_cpp=here has no convert_hf_to"),
        (["out=a", "format=gguf", "llama_cpp=llama.cpp"], "give out=a.gguf"),
        (["out=there.gguf", "format=gguf", "llama_cpp=llama.cpp"], "choose another"),
        (["out=a.gguf"], "need format=gguf; add it"),
        (["out=a", "dtype=q8_0"], "need format=gguf; add it"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_a_model_is_loaded(
    command, stub, arguments, message
):
    Path("there.gguf").write_text("mine")
    status, _, errors = command("path=.", *arguments)
    assert status == 2 and message in errors
    assert Path("there.gguf").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers of Llama and Pythia are not here")
@pytest.mark.parametrize(("family", "load"), [("llama", llama), ("gpt_neox", pythia)])
def test_llama_cpp_gives_the_greedy_tokens_of_transformers(command, tmp_path, family, load):
    tokenizer = load()
    path, llama_cpp = policy("final", family, tokenizer, hidden_size=64), find_llama_cpp(tmp_path)
    arguments = [f"path={path}", "format=gguf", f"llama_cpp={llama_cpp}"]
    status, _, errors = command(*arguments, "out=policy.gguf", "dtype=float32")
    assert status == 0, errors
    prompt = tokenizer("User: Name a fruit.\n\nAssistant:")["input_ids"]
    ids, template = greedy(find_cyllama(tmp_path), Path("policy.gguf"), 24, prompt)
    model = AutoModelForCausalLM.from_pretrained(path)
    lengths = {"max_new_tokens": 24, "min_new_tokens": 24}
    made = model.generate(torch.tensor([prompt]), do_sample=False, **lengths)
    assert ids == made[0, len(prompt) :].tolist()
    assert template == tokenizer.chat_template
    assert "stop_strings = ['\\nUser']" in template
