"""Tiny tokenizers and models for tests, built offline."""

from typing import Any

CORPUS = [
    "### User:\nName a fruit.\n\n### Assistant:\nAn apple is a fruit.",
    "Below is an instruction that describes a task. Write a response.",
]


def tiny_tokenizer() -> Any:
    """Byte-level BPE of 320 ids with distinct <pad>, <bos> and <eos>; it adds no BOS itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_model(family: str, tokenizer: Any, seed: int = 0, **overrides: Any) -> Any:
    """Causal language model of two layers whose logits differ clearly: no weight is near 0.

    Args:
        family: "llama" or "gpt_neox".
        overrides: values of the model's config, e.g. vocab_size or attention_dropout.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = AutoConfig.for_model(family, **{**values, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases: around what they are
                parameter.add_(0.1 * noise)
            elif "embed_in" in name or "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / 3)
    return model
