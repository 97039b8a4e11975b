"""The learning rate is a default of the method: full fine-tuning or LoRA adapters."""

import pytest

from rlhf.config import (
    STAGES,
    PPOStageConfig,
    SFTStageConfig,
    dotted,
    learning_rates,
    plain_values,
    sentences,
    with_learning_rates,
)
from rlhf.config.learning_rates import RATES


def test_full_fine_tuning_keeps_the_published_rates():
    full = {stage: list(learning_rates(STAGES[stage]()).values()) for stage in STAGES}
    assert full == {"sft": [2e-5], "reward": [9e-6], "ppo": [3e-6, 3e-6]}


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_get_ten_times_as_much_or_more(stage):
    full, lora = learning_rates(STAGES[stage]()), STAGES[stage](peft={"enabled": True})
    assert all(rate >= 10 * full[key] for key, rate in learning_rates(lora).items())


@pytest.mark.parametrize("stage", STAGES)
def test_the_sentence_of_the_knob_names_both_defaults(stage):
    for key, rates in RATES[STAGES[stage]].items():
        field = STAGES[stage].__dataclass_fields__[key.partition(".")[0]]
        text = sentences(field.metadata["group"])["learning_rate"]
        full, lora = (f"{rate:.0e}".replace("e-0", "e-") for rate in rates)
        assert f"(null: {full}, with LoRA adapters {lora})" in text


def test_a_given_rate_is_kept_and_the_other_is_said():
    said: list[str] = []
    config = PPOStageConfig(peft={"enabled": True}, ppo={"learning_rate": 5e-5})
    made = with_learning_rates(config, said.append)
    assert (made.ppo.learning_rate, made.critic.learning_rate) == (5e-5, 3e-4)
    assert said == ["critic.learning_rate=0.0003: default with LoRA adapters"]
    assert config.critic.learning_rate is None  # the caller's own is unchanged


def test_the_configuration_that_is_written_holds_the_number():
    config = with_learning_rates(SFTStageConfig(), print)
    assert dotted(plain_values(config))["trainer.learning_rate"] == 2e-5


def test_nothing_is_said_about_full_fine_tuning(capsys):
    assert with_learning_rates(SFTStageConfig(), print) and not capsys.readouterr().out
