"""Settings are tried on a model without weights: nothing but config.json is there to load."""

import sys

import pytest
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from transformers import dynamic_module_utils

from rlhf.config import InputError, ModelConfig, PeftConfig
from rlhf.models import try_settings

TOKENIZER = tiny_tokenizer()
WRONG = PeftConfig(enabled=True, target_modules=["nonsense"])


@pytest.fixture(scope="module", params=FAMILIES)
def without_weights(request, tmp_path_factory) -> str:
    """A directory that holds the configuration of a family and no weights."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, TOKENIZER).config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_are_tried_without_weights_in_every_family(without_weights, task_type):
    config = ModelConfig(path=without_weights)
    try_settings(config, PeftConfig(enabled=True), task_type)
    with pytest.raises(InputError, match="no linear layer named nonsense; it has .*(proj|dense)"):
        try_settings(config, WRONG, task_type)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapters_on_a_quantised_model_are_tried_too(tmp_path, quantization):
    tiny_model("llama", TOKENIZER).config.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), quantization=quantization)
    try_settings(config, PeftConfig(enabled=True))
    with pytest.raises(InputError, match="no linear layer named nonsense"):
        try_settings(config, WRONG)


def test_adapters_are_tried_on_a_model_that_will_be_built():
    config = ModelConfig(config={"model_type": "llama", "num_hidden_layers": 1})
    try_settings(config, PeftConfig(enabled=True, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="no linear layer named nonsense"):
        try_settings(config, WRONG)


def test_dropout_of_a_model_that_has_none_is_refused_without_weights():
    try_settings(
        ModelConfig(config={"model_type": "llama", "num_hidden_layers": 1}, dropout=0.1),
        PeftConfig(),
    )
    with pytest.raises(InputError, match="model.dropout=0.1 would do nothing: Mamba"):
        try_settings(
            ModelConfig(config={"model_type": "mamba", "num_hidden_layers": 1}, dropout=0.1),
            PeftConfig(),
        )


def test_a_model_whose_code_needs_numbers_waits_for_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *sys.path])
    (tmp_path / "config.json").write_text(
        '{"model_type": "needy", "auto_map": {"AutoConfig": "code.Config",'
        ' "AutoModelForCausalLM": "code.Model"}}'
    )
    (tmp_path / "code.py").write_text(
        "import torch\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n\n\n"
        "class Config(PretrainedConfig):\n    model_type = 'needy'\n\n\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        float(torch.ones(3).sum())\n"
    )
    try_settings(ModelConfig(path=str(tmp_path), trust_remote_code=True), WRONG)
    try_settings(ModelConfig(path=str(tmp_path)), WRONG)  # loading asks for trust_remote_code
