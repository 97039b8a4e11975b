"""The preflight of the policy: first ratio, stop token, tokenizer.

Run: python -m pytest tests/ppo/preflight/test_preflight_samples.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import re

import torch
from helpers.preflight import letters, look, scored_by
from helpers.tiny import CORPUS, tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, make_trainer, write_policy

from rlhf.checkpoint import make_record
from rlhf.config import SFTStageConfig
from rlhf.ppo.preflight.longest_step import longest_micro_batch
from rlhf.ppo.preflight.samples import examine_stop_token, examine_tokenizer, remedy_for_no_end
from rlhf.sampling import Generation, Sampling


def test_dropout_that_is_switched_on_after_loading_fails(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    assert look(trainer, capsys)[0]["first ratio"][1].startswith("largest |ratio - 1| 0; KL to")
    for layer in trainer.actors.policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.self_attn.train()
    found, bottom, message = look(trainer, capsys)
    assert found["first ratio"][0] == "FAIL" and "switch dropout off" in found["first ratio"][1]
    assert "failed: first ratio" in bottom and "first ratio: largest |ratio - 1|" in message


def test_a_reference_that_is_another_model_fails(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    trainer.actors.reference = tiny_model("llama", trainer.actors.tokenizer, seed=1)
    assert look(trainer, capsys)[0]["first ratio"][0] == "FAIL"


def test_numbers_that_are_not_finite_fail(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    with torch.no_grad():
        trainer.actors.policy.model.norm.weight.fill_(math.inf)
    found, _, _ = look(trainer, capsys)
    assert found["longest step"][0] == "FAIL" and "not finite" in found["longest step"][1]
    assert found["first ratio"][0] == "FAIL"


def ending_in(folder, stop_ids):
    """The tiny policy with these stop tokens."""
    directory = write_policy(folder / "policy")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return directory


def test_a_policy_that_never_ends_is_the_fault_of_what_it_comes_from(tmp_path, capsys):
    directory = ending_in(tmp_path, [2])
    trainer = scored_by(directory, tmp_path, letters)
    found, bottom, _ = look(trainer, capsys)
    status, text = found["stop token"]
    assert status == "WARN" and "given 48 tokens, " in text
    assert f"-> train {directory} first, on responses that all end: python -m rlhf.sft " in text
    assert "warning" in bottom and "failed" not in bottom
    record = make_record("sft", SFTStageConfig(), None, trainer.actors.tokenizer)
    (directory / "rlhf.json").write_text(json.dumps(dataclasses.asdict(record)))
    assert (
        "-> the SFT stage is at fault: train it longer" in look(trainer, capsys)[0]["stop token"][1]
    )


def test_where_a_policy_that_never_ends_comes_from_decides_the_remedy():
    tokenizer = tiny_tokenizer()
    sft, ppo = (make_record(s, SFTStageConfig(), "runs/a", tokenizer) for s in ("sft", "ppo"))
    assert remedy_for_no_end("runs/x", sft, True).startswith("the SFT stage is at fault")
    assert remedy_for_no_end("runs/x", ppo, True).endswith("started from (model.path=runs/a)")
    for can_chat in (True, False):
        remedy = remedy_for_no_end("some/model", None, can_chat)
        assert "SFT stage" not in remedy and "rlhf.sft model.path=some/model" in remedy
        assert ("set dataset.as_conversation=true" in remedy) == can_chat


def test_a_penalty_that_most_answers_would_get_stops_with_what_mends_it(
    tmp_path, capsys, monkeypatch
):
    trainer = scored_by(ending_in(tmp_path, [2]), tmp_path, letters, missing_eos_penalty=-1.0)
    found, bottom, message = look(trainer, capsys)
    status, text = found["stop token"]
    assert status == "FAIL" and "failed: stop token" in bottom
    assert "the others get ppo.missing_eos_penalty=-1 for a score" in text
    assert message.endswith("this mends it:\n\nppo.missing_eos_penalty=null")

    arguments = ["scorer.path=my.score", "ppo.missing_eos_penalty=-1", "dataset.path=a b.jsonl"]
    monkeypatch.setattr("sys.argv", ["/a/rlhf/ppo/__main__.py", *arguments])
    command = look(trainer, capsys)[2].splitlines()[-1]
    rest = "scorer.path=my.score 'dataset.path=a b.jsonl' ppo.missing_eos_penalty=null"
    assert command == f"python -m rlhf.ppo {rest}"

    longer = ending_in(tmp_path, [2, *range(10, 320, 10)])
    knobs = {"missing_eos_penalty": -1.0, "response_length": 3}
    trainer = scored_by(longer, tmp_path, letters, **knobs)
    trainer.config.watchdog.eos_rate = 0.7
    assert re.search(r" ppo\.response_length=\d+$", look(trainer, capsys)[2])
    trainer.config.ppo.mask_truncated = True  # they are then left out
    assert look(trainer, capsys)[0]["stop token"][0] == "WARN"


def test_a_budget_that_is_too_short_is_told_from_a_policy_at_fault(tmp_path, capsys):
    directory = ending_in(tmp_path, [2, *range(10, 320, 10)])
    trainer = scored_by(directory, tmp_path, letters, response_length=3)
    trainer.config.watchdog.eos_rate = 0.7
    status, text = look(trainer, capsys)[0]["stop token"]
    assert status == "WARN" and "of at most 3 tokens; given 12 tokens, " in text
    assert "raise ppo.response_length to about " in text
    trainer.config.watchdog.eos_rate = None
    assert look(trainer, capsys)[0]["stop token"][0] == "ok"


def longest_rollout(trainer, finished):
    """Responses that use the whole budget, with these flags."""
    part = longest_micro_batch(trainer).select(torch.zeros(len(finished), dtype=torch.long))
    return dataclasses.replace(part, finished=torch.tensor(finished))


def test_the_budget_that_is_advised_lets_95_percent_of_those_that_end_end(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = longest_rollout(trainer, [False] * 9 + [True])
    lengths = [*range(1, 21), 30, 30]
    longer = Generation([[5] * n for n in lengths], [[0.0] * n for n in lengths], [True] * 22)
    longer.finished[-2:] = [False, False]  # 20 of 22 end, 19 of them within 19 tokens
    sampling = trainer.sampling
    finding = examine_stop_token(2, sampling, rollout, 0.5, lambda: (30, longer), "train it")
    assert "response_length to about 19, " in finding.remedy and "30 tokens, 91% do" in finding.text
    finding = examine_stop_token(2, sampling, rollout, 0.95, lambda: (30, longer), "train it")
    assert finding.remedy == "train it"


def test_an_eos_that_can_never_be_sampled_fails(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = longest_rollout(trainer, [True] * 4)
    sampling = Sampling(10, (7,), torch.tensor([0, 7]))  # as a caller of the library may build it
    finding = examine_stop_token(7, sampling, rollout, 0.5, None, "")
    assert (
        finding.status == "FAIL" and "EOS (id 7)" in finding.text and "eos_token" in finding.remedy
    )


def test_text_that_does_not_survive_the_tokenizer_is_shown():
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    assert examine_tokenizer(tokenizer, ["Name a\nfruit ."], ["An Apple"]).status == "ok"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    finding = examine_tokenizer(tokenizer, ["name a fruit", "The river Seine"], ["an apple"])
    assert finding.status == "WARN" and "1 of 3 texts" in finding.text
    assert (
        "'TheriverSeine' -> 'theriverseine'" in finding.text and "model.tokenizer" in finding.remedy
    )


def test_special_tokens_and_the_chat_template_are_checked():
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": CORPUS[1]}]
    assert examine_tokenizer(tokenizer, [talk], []).status == "FAIL"
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"
    assert examine_tokenizer(tokenizer, [talk], []).status == "ok"
    tokenizer.pad_token = tokenizer.eos_token
    assert examine_tokenizer(tokenizer, [talk], []).status == "ok"  # any id can pad
