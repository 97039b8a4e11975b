"""The engine `vllm` against a server in this process: what every engine must do, and servers that
are wrong, silent or broken. `tests/end_to_end/test_vllm_server.py` runs the real one.

Run: pytest tests/sampling/test_vllm.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.fake_vllm import fake_vllm
from helpers.families import LORA
from helpers.tiny import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from rlhf.config import InputError, SamplingConfig
from rlhf.engine_choice import choose_server
from rlhf.models import add_lora
from rlhf.sampling import VLLM, Sampling, engine_of, generate, stream, uniform_noise, use_engine
from rlhf.tokenizer import StopStrings, declare_stop_strings, forbidden_token_ids
from rlhf.vllm_server import ONCE, check_server, model_and_version

TOKENIZER = tiny_tokenizer()
PROMPTS = [[40, 41, 42], [50], [60, 61], [60, 61], [60, 61], [70, 71, 72, 73]]
BUDGET = 8
NOISE = uniform_noise((3,), range(6), BUDGET)
STOPS = tuple(range(3, 320, 6))


@pytest.fixture
def server():
    with fake_vllm(TOKENIZER) as fake:
        yield fake


@pytest.fixture
def llama():
    return tiny_model("llama", TOKENIZER)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("rlhf.http_endpoint.FIRST_WAIT", 0.0)


def client_of(server, **knobs):
    return VLLM(SamplingConfig(engine="vllm", url=server.url, **knobs))


def connect(model, server, **knobs):
    client = client_of(server, **knobs)
    client.begin(model, TOKENIZER, torch.float32)
    use_engine(model, "vllm", server=client).refresh()
    return client


def sampling_for(model, stop_ids=STOPS, **knobs):
    forbidden = forbidden_token_ids(TOKENIZER, model.config.vocab_size)
    return Sampling(BUDGET, tuple(stop_ids), forbidden, **knobs)


def shift(model, seed=0):
    """Take the adapters of a model away from where they begin, where they add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def expected_logprobs(model, prompt, ids, sampling):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logits[:, sampling.forbidden] = -torch.inf
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


# --- What every engine must do ------------------------------------------------------------------


def test_the_likeliest_tokens_are_those_of_the_loop(llama, server):
    free = generate(llama, PROMPTS, sampling_for(llama, (-1,)), None).ids
    sampling = sampling_for(llama, (free[0][2], free[5][4]))
    expected = generate(llama, PROMPTS, sampling, None)
    assert {*expected.finished} == {True, False}
    connect(llama, server)
    actual = generate(llama, PROMPTS, sampling, None, batch_size=2)
    assert actual.ids == expected.ids and actual.finished == expected.finished
    for mine, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert list(stream(llama, PROMPTS[0], sampling, None)) == expected.ids[0]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_logprobs_are_those_of_the_model_at_the_temperature(temperature, llama, server):
    connect(llama, server)
    sampling = sampling_for(llama, temperature=temperature)
    made = generate(llama, PROMPTS, sampling, NOISE)
    ends = [row[-1] in STOPS for row in made.ids]
    assert made.finished == ends
    for prompt, ids, logprobs in zip(PROMPTS, made.ids, made.logprobs, strict=True):
        assert TOKENIZER.pad_token_id not in ids and len(ids) <= BUDGET
        expected = expected_logprobs(llama, prompt, ids, sampling)
        assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_a_response_depends_on_its_random_numbers_and_not_on_its_batch(llama, server):
    connect(llama, server)
    sampling = sampling_for(llama)
    made = generate(llama, PROMPTS, sampling, NOISE).ids
    assert made[2] != made[3] != made[4]  # one prompt
    assert generate(llama, PROMPTS[3:5], sampling, NOISE[3:5]).ids == made[3:5]
    assert generate(llama, PROMPTS, sampling, uniform_noise((4,), range(6), BUDGET)).ids != made


def test_a_stop_string_ends_a_response_and_counts_as_finished(llama, server):
    tokenizer = tiny_tokenizer()
    free = generate(llama, PROMPTS, sampling_for(llama, (-1,)), None)
    stops = [tokenizer.decode(free.ids[0][3:4])]
    tokenizer.chat_template = declare_stop_strings("{{ messages }}", stops)
    sampling = sampling_for(llama, (-1,), stop_strings=StopStrings(tokenizer))
    expected = generate(llama, PROMPTS, sampling, None)
    connect(llama, server)
    actual = generate(llama, PROMPTS, sampling, None)
    assert actual.ids == expected.ids and actual.finished == expected.finished
    assert len(actual.ids[0]) <= 4 and actual.finished[0]


def test_the_next_call_sees_weights_that_have_changed(llama, server):
    client = connect(llama, server)
    sampling = sampling_for(llama)
    generate(llama, PROMPTS, sampling, NOISE)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(1.2)
    engine_of(llama).refresh()
    made = generate(llama, PROMPTS, sampling, NOISE)
    expected = expected_logprobs(llama, PROMPTS[0], made.ids[0], sampling)
    assert_close(made.logprobs[0], expected, rtol=1e-5, atol=1e-5)
    told = [body["kwargs"]["weights_path"] for path, body in server.requests if "rpc" in path]
    assert [Path(folder).is_dir() for folder in told] == [False, True]  # one copy at a time
    assert [path for path, _ in server.requests].count("/reset_prefix_cache") == 2
    client.close()
    assert not Path(told[1]).parent.exists()


def test_adapters_are_merged_into_the_files_that_it_gets(llama, server):
    model = shift(add_lora(llama, LORA, "CAUSAL_LM", 0))
    connect(model, server, weights="files")
    sampling = sampling_for(model.get_base_model())
    made = generate(model, PROMPTS, sampling, NOISE)
    expected = expected_logprobs(model, PROMPTS[0], made.ids[0], sampling)
    assert_close(made.logprobs[0], expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in server.model.state_dict())


def test_what_the_generation_config_of_the_server_may_set_is_set_back(llama, server):
    connect(llama, server)
    generate(llama, PROMPTS[:1], sampling_for(llama), NOISE[:1])
    body = server.requests[-1][1]
    plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    assert plain.items() <= body.items()


# --- Servers that are not as they should be -----------------------------------------------------


def test_a_server_is_probed_and_said(llama, server):
    said = choose_server(llama, TOKENIZER, client_of(server), None)
    start = f"vllm 0.32.0, server {server.url} (weights as files, because all weights train: 0."
    assert said.startswith(start)
    rest = r"\d\d MB in \d+\.\d\d s in float32; a probe differs by (.+)\)"
    found = re.fullmatch(rest, said.removeprefix(start))
    assert found and float(found[1]) < 1e-5


def other_weights(server):
    server.model = tiny_model("llama", TOKENIZER, seed=5)
    server.fault = lambda path, body: (200, {"results": [None]}) if "rpc" in path else None


def slightly_other_weights(server):
    """As a server that went on with the weights before the update."""
    load = server.answer

    def answer(path, body):
        made = load(path, body)
        if "rpc" in path:
            with torch.no_grad():
                for parameter in server.model.parameters():
                    parameter.mul_(1.003)
        return made

    server.answer = answer


def raw_logprobs(server):
    server.raw = True


@pytest.mark.parametrize("spoil", [other_weights, slightly_other_weights, raw_logprobs])
def test_a_server_with_other_logprobs_is_refused(spoil, llama, server):
    spoil(server)
    with pytest.raises(InputError) as error:
        choose_server(llama, TOKENIZER, client_of(server), None)
    said = str(error.value)
    assert said.startswith(f"sampling.engine=vllm: log-probs of {server.url} are not those of the ")
    assert said.endswith("start it with --logprobs-mode processed_logprobs --dtype float32")


def answers(where, answer):
    return lambda path, body: answer if path == where else None


BROKEN = {
    "html": (answers("/v1/models", (200, b"<html><title>Hello</title>")), "an HTML page ('Hello')"),
    "another server": (answers("/version", (404, {"detail": "Not Found"})), "404 Not Found"),
    "other fields": (answers("/v1/models", (200, {"data": []})), "is no vLLM server"),
    "no developer mode": (
        answers("/collective_rpc", (404, {"detail": "Not Found"})),
        "'Not Found'; it takes weights if it was started with VLLM_SERVER_DEV_MODE=1",
    ),
    "cannot read the folder": (
        answers("/collective_rpc", (500, {"error": {"message": "no such folder"}})),
        "500 Internal Server Error: 'no such folder' (after 4 tries); it takes weights if",
    ),
    "truncated": (answers("/v1/completions", (200, b'{"choices": [')), "is not JSON"),
    "no ids": (answers("/v1/completions", (200, {"choices": [{"text": "a"}]})), "not token_ids"),
    "nan": (
        answers(
            "/v1/completions",
            (200, b'{"choices":[{"token_ids":[5],"logprobs":{"token_logprobs":[NaN]}}]}'),
        ),
        "as many finite token_logprobs",
    ),
    "prompt too long": (
        answers("/v1/completions", (400, {"error": {"message": "max_model_len is 4"}})),
        "400 Bad Request: 'max_model_len is 4'",
    ),
    "dying": (answers("/v1/completions", "die"), "cannot be reached ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_server_is_named_with_what_it_said(name, llama, server):
    server.fault, said = BROKEN[name]
    with pytest.raises(InputError) as error:
        connect(llama, server)
        generate(llama, PROMPTS, sampling_for(llama), NOISE)
    assert f"sampling.url={server.url}" in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.requests) < 20  # bounded


def test_requests_that_fail_once_are_repeated(llama, server):
    connect(llama, server)
    expected = generate(llama, PROMPTS, sampling_for(llama), NOISE)
    seen = []

    def fail_once(path, body):
        if path == "/v1/completions" and body["seed"] not in seen:
            seen.append(body["seed"])
            return (503, {"error": "busy"}) if len(seen) % 2 else "die"

    server.fault = fail_once
    assert generate(llama, PROMPTS, sampling_for(llama), NOISE).ids == expected.ids
    assert len(seen) == 6


# --- Before a model loads -----------------------------------------------------------------------


def test_what_is_missing_is_said_before_a_model_loads(server, tmp_path, monkeypatch):
    python = tmp_path / "python"
    without = "has no vLLM; install it there: "
    table = {
        "sampling.url=http://127.0.0.1:99999 is not a URL": {"url": "http://127.0.0.1:99999"},
        "sampling.url=http://127.0.0.1:9 cannot be reached (Connection refused)": {
            "url": "http://127.0.0.1:9"
        },
        f"sampling.weights_dir={tmp_path}/no does not exist; make it: mkdir -p": {
            "url": server.url,
            "weights_dir": f"{tmp_path}/no",
        },
        f"sampling.vllm_python={python} cannot be run (": {"vllm_python": str(python)},
        f"sampling.vllm_python={sys.executable} {without}": {"vllm_python": sys.executable},
    }
    for said, knobs in table.items():
        with pytest.raises(InputError) as error:
            check_server(SamplingConfig(engine="vllm", **knobs))
        assert str(error.value).startswith(said)
    check_server(SamplingConfig(engine="vllm", url=server.url))
    check_server(SamplingConfig(url="http://127.0.0.1:9"))  # a rule refuses that
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_server(SamplingConfig(engine="vllm", url=server.url))
    with pytest.raises(InputError, match="host alone can reach, and the 4 processes are on sev"):
        check_server(SamplingConfig(engine="vllm", vllm_python=sys.executable))


# --- A server that the run starts ---------------------------------------------------------------

# a `python` that has vLLM, whose server answers nothing but who it is
SCRIPT = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
if sys.argv[1] == "-c":
    sys.exit(0)
if "--broken" in sys.argv:
    sys.exit("(EngineCore pid=7) ERROR [core.py:12] ValueError: no room for the cache")

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = {"/v1/models": {"data": [{"id": " ".join(sys.argv[1:])}]}}
        known["/version"] = {"version": os.environ["VLLM_SERVER_DEV_MODE"]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(known[self.path]).encode())
    def do_POST(self):
        print("WARNING [a.py:1] limits can cause OSError: too many files", file=sys.stderr)
        print("RuntimeError: out of memory", file=sys.stderr, flush=True)
        self.server.socket.close()
        self.connection.shutdown(2)
        time.sleep(1)  # as a process that ends takes a moment
        os._exit(3)

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def own(tmp_path):
    """A client that starts its server, with further arguments."""
    (tmp_path / "script.py").write_text(SCRIPT)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/script.py "$@"\n')
    python.chmod(0o755)
    made = []

    def make(*arguments):
        settings = SamplingConfig(engine="vllm", vllm_python=str(python), vllm_args=[*arguments])
        made.append(VLLM(settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_a_server_is_started_on_this_machine_alone_and_ends_with_the_run(own, llama, capsys):
    client = own("--max-model-len", "64")
    assert client.begin(llama, TOKENIZER, torch.float32) == f"vllm 1, server {client.url}"
    arguments = model_and_version(client.url)[0].split()
    assert arguments[:3] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in Path(arguments[3]).iterdir()}
    port = client.url.rpartition(":")[2]
    assert " ".join(arguments[4:]) == (
        f"--host 127.0.0.1 --port {port} --dtype float32 --logprobs-mode processed_logprobs "
        "--max-model-len 64"
    )
    assert f"vllm: {client.url} answers after" in capsys.readouterr().out
    client.close()
    with pytest.raises(InputError, match="cannot be reached"):
        model_and_version(client.url, endpoint=ONCE)
    assert not Path(arguments[3]).exists()


def test_a_server_that_does_not_start_says_why(own, llama):
    with pytest.raises(InputError) as error:
        own("--broken").begin(llama, TOKENIZER, torch.float32)
    said = "the vLLM server ended with status 1; it said: ValueError: no room for the cache"
    assert str(error.value).endswith(f"python: {said}")


def test_a_server_that_dies_later_says_why(own, llama):
    client = own()
    client.begin(llama, TOKENIZER, torch.float32)
    with pytest.raises(InputError, match="ended with status 3; it said: RuntimeError: out of mem"):
        client.load(llama, llama)
