"""What `rlhf.plan` refuses, and the published runs that it reckons.

Run: python -m pytest tests/commands/test_plan_options.py
"""

import pytest

from rlhf.config import CONF_DIR, read_yaml
from rlhf.plan.__main__ import main
from rlhf.plan.work import KNOWN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt_length=2000"], "2000 + response_length=256 exceed the context of llama-7b, 2048"),
        (["stage=sft", "lora=true", "share_base=true"], "share_base=true is about .*stage=ppo"),
        (["stage=reward", "offload_frozen=true"], "offload_frozen=true is about .*stage=ppo"),
        (["gpus"], "cannot read 'gpus'; write key=value, e.g. model=gpus"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, message, capsys):
    assert main(["model=llama-7b", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    before, _, after = message.partition(".*")
    assert before in err and after in err


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("Alpaca 7B, SFT", "alpaca_sft"),
        ("Vicuna 13B, SFT", "vicuna_sft"),
        ("Dolly 12B, SFT", "dolly_v2_sft"),
        ("InstructGPT 1.3B, PPO", "instructgpt_ppo"),
        ("InstructGPT 6B, PPO", "instructgpt_ppo"),
        ("InstructGPT's episodes at 70B, PPO", "instructgpt_ppo"),
    ],
)
def test_published_runs_have_the_epochs_of_their_recipes(name, recipe):
    run = next(run for run in KNOWN if run.name == name)
    values = read_yaml(CONF_DIR / "recipe/parts" / f"{recipe}.yaml")
    of_trainer, of_ppo = values.get("trainer", {}), values.get("ppo", {})
    assert run.epochs == of_trainer.get("num_train_epochs", of_ppo.get("num_ppo_epochs"))
