"""How weights reach a vLLM server: as a LoRA adapter alone, and from GPU to GPU by TRL's client,
whose requests are real here while NCCL is not. The third way, files, is in test_vllm.py.

Run: pytest tests/sampling/test_vllm_weights.py
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.fake_vllm import fake_vllm
from helpers.families import LORA
from helpers.tiny import tiny_model
from test_vllm import (
    NOISE,
    PROMPTS,
    TOKENIZER,
    client_of,
    connect,
    expected_logprobs,
    sampling_for,
    shift,
)
from torch.testing import assert_close

from rlhf.config import InputError
from rlhf.engine_choice import choose_server
from rlhf.models import add_lora
from rlhf.models.stacked import keep_apart
from rlhf.sampling import engine_of, generate
from rlhf.sampling.vllm_weights import server_arguments


@pytest.fixture
def server():
    with fake_vllm(TOKENIZER) as fake:
        yield fake


@pytest.fixture
def policy():
    return shift(add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("rlhf.http_endpoint.FIRST_WAIT", 0.0)


def assert_it_samples(model):
    sampling = sampling_for(model)
    made = generate(model, PROMPTS, sampling, NOISE)
    for prompt, ids, logprobs in zip(PROMPTS, made.ids, made.logprobs, strict=True):
        expected = expected_logprobs(model, prompt, ids, sampling)
        assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def bodies(server, path):
    return [body for where, body in server.requests if where == path]


# --- The adapter alone --------------------------------------------------------------------------


def test_the_base_goes_over_once_and_then_the_adapter_alone(policy, server):
    server.model = tiny_model("llama", TOKENIZER, seed=5)  # what the user has started it with
    client = connect(policy, server)
    assert client.way == "adapter" and engine_of(policy).copy is None
    assert_it_samples(policy)
    shift(policy, seed=1)
    engine_of(policy).refresh()
    assert_it_samples(policy)
    (base,) = bodies(server, "/collective_rpc")
    assert base["kwargs"]["weights_path"].endswith("/0")
    loaded = bodies(server, "/v1/load_lora_adapter")
    assert len({order["lora_name"] for order in loaded}) == len(loaded) == 3  # one is the trial
    gone = [order["lora_name"] for order in bodies(server, "/v1/unload_lora_adapter")]
    assert gone == [order["lora_name"] for order in loaded[:-1]]
    folders = [Path(order["lora_path"]) for order in loaded]
    assert [folder.is_dir() for folder in folders] == [False, False, True]
    files = {file.name for file in folders[-1].iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    client.close()
    assert not folders[-1].parent.exists()


def test_the_base_has_the_adapter_that_stays_apart(server):
    lower = shift(add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0), seed=7)
    policy = add_lora(keep_apart(lower, "the adapter of SFT"), LORA, "CAUSAL_LM", 1)
    client = connect(shift(policy), server)
    assert client.way == "adapter"
    assert_it_samples(policy)


def test_the_choice_is_said_with_the_size(policy, server):
    said = choose_server(policy, TOKENIZER, client_of(server), None)
    assert f"server {server.url} (weights as adapter: 0." in said
    said = choose_server(policy, TOKENIZER, client_of(server), torch.bfloat16)
    assert " s in bfloat16; a probe differs by " in said
    assert server.model.dtype == torch.bfloat16
    server.max_lora_rank = None
    said = choose_server(policy, TOKENIZER, client_of(server), None)
    assert "(weights as files, because the server took no adapter: 0." in said
    assert_it_samples(policy)


def test_a_server_that_leaves_a_layer_out_of_the_adapter_is_refused_before_training(server):
    policy = add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0)  # adds nothing yet
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    load = server.load_adapter

    def load_less(name, folder):
        answer = load(name, folder)
        with torch.no_grad():
            for key, parameter in server.adapters[name].named_parameters():
                parameter.mul_("layers.1.mlp.up_proj" not in key or "lora_B" not in key)
        return answer

    choose_server(policy, TOKENIZER, client_of(server), None)
    server.load_adapter = load_less
    with pytest.raises(InputError, match="or its LoRA is not ours for this family: set sampl"):
        choose_server(policy, TOKENIZER, client_of(server), None)
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name]), name


def without_lora(server):
    server.max_lora_rank = None
    return "LoRA is not enabled."


def with_a_low_rank(server):
    server.max_lora_rank = 2
    return "LoRA rank 4 is greater than max_lora_rank 2."


def without_updates(server):
    refusal = (404, {"detail": "Not Found"})
    server.fault = lambda path, body: refusal if path == "/v1/load_lora_adapter" else None
    return "Not Found"


@pytest.mark.parametrize("spoil", [without_lora, with_a_low_rank, without_updates])
def test_a_server_that_takes_no_adapters_is_told_how_to_start(spoil, policy, server, capsys):
    said = spoil(server)
    with pytest.raises(InputError) as error:
        connect(policy, server, weights="adapter")
    assert f"sampling.url={server.url}/v1/load_lora_adapter answered" in str(error.value)
    assert said in str(error.value) and str(error.value).count("\n") == 0
    start = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 4, and can read "
    assert start in str(error.value)
    assert str(error.value).endswith("(sampling.weights_dir); or set sampling.weights=files")
    assert connect(policy, server).way == "files"
    assert "sampling.weights=auto takes files, not an adapter: " in capsys.readouterr().out


def test_a_server_that_was_started_again_and_lacks_the_base_is_refused(policy, server):
    connect(policy, server)
    server.adapters.clear()
    with pytest.raises(InputError, match="started again, without the base .*; resume=true sends"):
        engine_of(policy).refresh()


def test_a_model_that_trains_more_than_adapters_goes_over_as_files(server):
    model, token = tiny_model("llama", TOKENIZER), 300
    refused = {"all weights train": model}
    rows = add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0, [token])
    refused["rows of new tokens train too"] = rows
    for reason, policy in refused.items():
        with pytest.raises(InputError) as error:
            client_of(server, weights="adapter").begin(policy, TOKENIZER, torch.float32)
        said = f"sampling.weights=adapter: {reason}; set sampling.weights=files"
        assert str(error.value) == said
    assert connect(shift(rows), server).way == "files"
    assert_it_samples(rows)


def test_a_server_of_our_own_starts_with_room_for_the_adapter():
    policy = add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0)
    assert server_arguments(policy, "adapter")[-2:] == ["--max-lora-rank", "8"]
    policy.peft_config["default"].r = 33
    assert server_arguments(policy, "adapter") == (
        ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "64"]
    )
    assert server_arguments(policy, "files") == []


# --- By NCCL ------------------------------------------------------------------------------------


def test_nccl_is_refused_where_it_cannot_be(server):
    with pytest.raises(InputError) as error:
        client_of(server, weights="nccl")
    said = str(error.value)
    assert said.startswith("sampling.weights=nccl ") and said.endswith("sampling.weights=files")


@pytest.fixture
def nccl(monkeypatch, server):
    """vLLM's side of NCCL as far as TRL imports it; what it broadcasts becomes the server's model
    when the update is finished."""
    sent, group = [], SimpleNamespace(group=SimpleNamespace())

    def broadcast(iterator, group, src, post_iter_func):
        sent.append({name: post_iter_func((name, weight)) for name, weight in iterator})

    def stand_in(name, path=(), **content):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), [*map(str, path)]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("", ".utils", ".distributed", ".distributed.weight_transfer"):
        stand_in(f"vllm{name}")
    transfer = "vllm.distributed.weight_transfer"
    stand_in("vllm.utils.network_utils", get_ip=lambda: "127.0.0.1")
    stand_in(f"{transfer}.nccl_common", trainer_init=lambda info: group)
    stand_in(f"{transfer}.packed_tensor", packed_nccl_broadcast_producer=broadcast)
    utils = importlib.import_module("trl.import_utils")
    monkeypatch.setattr(utils, "is_vllm_available", lambda min_version=None: True)
    stand_in("trl.generation", [Path(utils.__file__).with_name("generation")])  # the client alone
    monkeypatch.delitem(sys.modules, "trl.generation.vllm_client", raising=False)
    monkeypatch.setattr("rlhf.sampling.vllm.require_cuda", lambda way: None)

    def answer(path, body):
        known = {"/health": {}, "/get_world_size": {"world_size": 2}}
        known["/server_info?config_format=json"] = {"vllm_config": {"weight_transfer_config": {}}}
        for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights"):
            known[f"/{name}"] = {}
        if path == "/finish_weight_update":
            server.model = tiny_model("llama", TOKENIZER, seed=9)
            server.model.load_state_dict(sent[-1], strict=False)
            return 200, {}
        return (200, known[path]) if path in known else None

    server.fault = answer
    yield sent
    sys.modules.pop("trl.generation.vllm_client", None)  # it knows these modules


def test_trl_sends_the_merged_weights_from_gpu_to_gpu(policy, server, nccl):
    said = choose_server(policy, TOKENIZER, client_of(server, weights="nccl"), None)
    assert "(weights as nccl: 0." in said
    (group,) = bodies(server, "/init_weight_transfer_engine")
    assert group["init_info"]["world_size"] == 3 and group["init_info"]["rank_offset"] == 1
    update = bodies(server, "/update_weights")[0]["update_info"]
    assert update["names"] == [name for name, _ in engine_of(policy).copy.named_parameters()]
    assert {*update["dtype_names"]} == {"float32"}
    shift(policy, seed=1)
    engine_of(policy).refresh()
    assert_it_samples(policy)
    assert len(nccl) == 2 and not bodies(server, "/collective_rpc")


def test_a_server_without_a_transfer_engine_is_told_how_to_start(policy, server, nccl):
    answer = server.fault
    info = "/server_info?config_format=json"
    none = {"vllm_config": {"weight_transfer_config": None}}
    server.fault = lambda path, body: (200, none) if path == info else answer(path, body)
    with pytest.raises(InputError) as error:
        connect(policy, server, weights="nccl")
    start = f"sampling.weights=nccl: sampling.url={server.url}: RuntimeError: The vLLM server at "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("""'{"backend":"nccl"}', or set sampling.weights=files""")
