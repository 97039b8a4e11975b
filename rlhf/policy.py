"""A trained policy that answers: what `rlhf.chat` and `rlhf.generate` share.

It is loaded with the template and the stop tokens of its training. A model continues text if it has
no chat template or was trained on text prompts. Left out: the answers themselves (`rlhf.sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.checkpoint import holds_tensors
from rlhf.config import InputError, ModelConfig, knob, refuse
from rlhf.console import quiet_libraries
from rlhf.inputs import check_model, check_template, failures

OBEYED = {"temperature", "top_p", "top_k", "do_sample"}  # settings that our sampling loop has


@dataclass
class PolicyOptions:
    """Options of every command that asks a policy."""

    path: str
    """Stage directory, other model directory or Hub id."""
    system: str | None = None
    """System message."""
    chat_template: str | None = None
    """Replaces the model's own template: plain, alpaca or a .jinja file."""
    temperature: float | None = knob(None, ge=0)
    """0 always takes the likeliest token (default: the model's generation config, else 1)."""
    top_p: float | None = knob(None, gt=0, le=1)
    """Share of the probability to sample from (default: the generation config, else off)."""
    top_k: int | None = knob(None, ge=0)
    """Number of likeliest tokens to sample from (default: the generation config, else off)."""
    response_length: int = knob(256, ge=1)
    """Longest answer, tokens; less where the prompt leaves less of the context."""
    seed: int = knob(1, ge=0)
    """Equal seeds give equal answers."""
    device: str | None = None
    """Device such as cpu or cuda:1 (default: a GPU if there is one)."""
    engine: str = knob("auto", choices=("auto", "loop", "graph"))
    """How tokens are sampled, see sampling.engine of rlhf.ppo: auto, loop or graph."""
    trust_remote_code: bool = False
    """true: the model's own Python files may run."""

    def with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Begin a conversation with the system message, if it has none."""
        from rlhf.data import whole_characters

        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": whole_characters(self.system)}, *messages]


def check_policies(options: PolicyOptions, paths: Mapping[str, str]) -> None:
    """Refuse models and a chat template that cannot be used, before torch is imported.

    Args:
        paths: name of an option -> the model that it names.
    """
    checks: list[Callable[[], None]] = [
        partial(_check, options, path, field) for field, path in paths.items()
    ]
    if options.chat_template is not None:
        source = next(iter(paths.values()))
        checks.append(partial(check_template, options.chat_template, source, "chat_template"))
    refuse([*failures(checks)])


def _check(options: PolicyOptions, path: str, field: str) -> None:
    is_ppo = holds_tensors(Path(path), "policy")
    if is_ppo or (Path(path) / "model").is_dir():
        kind = "PPO checkpoint" if is_ppo else "checkpoint in slices"
        raise InputError(
            f"{field}={path} is a {kind}; make a model directory from it with "
            f"python -m rlhf.export path={path} out=<directory>"
        )
    check_model(path, field, ("sft", "ppo"), code=options.trust_remote_code)


class Policy:
    """A trained policy and how it is asked.

    Attributes:
        record: of the stage that wrote the model; None for a model from elsewhere.
        why_text: reason why the model continues text; None if it answers conversations.
        temperature: 0 takes the likeliest token.
        engine: what samples, in words.
    """

    def __init__(self, options: PolicyOptions, path: str, field: str = "path"):
        """Load the model at `path`, which the option `field` holds."""
        check_policies(options, {field: path})
        from rlhf.engine_choice import choose_engine
        from rlhf.equivalence import require_cache

        self.options, self.path = options, path
        self.model, self.tokenizer, self.record, has_template = _load(options, path, field)
        where, fix = f"{field}={path}", "take a model of another family"
        require_cache(self.model, self.tokenizer, where, fix, num_rows=1)
        self.engine = choose_engine(self.model, self.tokenizer, options.engine, num_rows=1)
        self.why_text = None
        if options.chat_template is None:
            if not has_template:
                self.why_text = "it has no chat template"
            elif self.record and self.record.prompts == "text":
                self.why_text = "it was trained on text prompts"
        if self.why_text and options.system is not None:
            raise InputError(
                f"{where} takes no system message: {self.why_text}; leave system out, or add "
                "chat_template=plain or chat_template=alpaca"
            )
        self.temperature, self.sampling = self._sampling()

    def _sampling(self) -> tuple[float, Any]:
        """Temperature and settings: the options, else the generation config, else plain ones."""
        from rlhf.sampling import sampling_for

        configured = self.model.generation_config
        greedy = configured.do_sample is False
        settings: dict[str, Any] = {"temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "top_k": 0}
        for source in [self.options] if greedy else [configured, self.options]:
            given = {name: getattr(source, name, None) for name in settings}
            settings |= {name: value for name, value in given.items() if value is not None}
        # generation configs may hold less than 0: transformers calls that greedy, vLLM top_k off
        temperature, top_k = max(settings["temperature"], 0.0), max(int(settings["top_k"]), 0)
        return temperature, sampling_for(
            self.model,
            self.tokenizer,
            self.options.response_length,
            temperature or 1.0,  # for greedy answers the divisor of the logits is irrelevant
            settings["top_p"],
            top_k,
        )

    def describe(self) -> str:
        """Say what was loaded, how it samples, and which generation settings are not applied."""
        from rlhf.models import parameter_count, sampling_settings

        s, stage = self.sampling, f"{self.record.stage} stage, " if self.record else ""
        lines = [
            f"{self.path}: {stage}{type(self.model).__name__}, "
            f"{parameter_count(self.model)[0]:,} parameters on {self.model.device}; "
            f"temperature {self.temperature:g}, top_p {s.top_p:g}, top_k {s.top_k}, "
            f"at most {s.max_new_tokens} tokens an answer"
        ]
        if self.options.engine != "auto" or self.model.device.type != "cpu":
            lines.append(f"  engine: {self.engine}")
        if self.why_text:
            lines.append(
                f"  {self.why_text}: it continues each line as text and does not see earlier lines "
                "(chat_template=alpaca or plain turns lines into questions)"
            )
        configured = sampling_settings(self.model)
        others = [f"{name}={configured[name]}" for name in configured if name not in OBEYED]
        if others:
            lines.append(f"  not applied from its generation config: {', '.join(others)}")
        return "\n".join(lines)

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a text to continue, or of a conversation to answer."""
        from rlhf.data import encode_prompt

        if not isinstance(prompt, str):
            prompt = self.options.with_system(prompt)
        return encode_prompt(prompt, self.tokenizer)

    def text(self, ids: list[int]) -> str:
        """The text of an answer."""
        from rlhf.tokenizer import response_text

        return response_text(ids, self.tokenizer, "" if self.why_text else None)


def _load(options: PolicyOptions, path: str, field: str) -> tuple[Any, Any, Any, bool]:
    """Model, tokenizer, record of the stage, and whether it has a chat template of its own."""
    import torch

    from rlhf.checkpoint import require_stage
    from rlhf.distributed import default_device
    from rlhf.models import load_policy
    from rlhf.tokenizer import load_tokenizer, read_tokenizer

    quiet_libraries()
    device = options.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device={device} cannot be used here ({reason})") from error
    record = require_stage(path, ("sft", "ppo"), field)
    template, code = options.chat_template, options.trust_remote_code
    config = ModelConfig(path=path, dtype="auto", chat_template=template, trust_remote_code=code)
    tokenizer = load_tokenizer(config, field)
    model: Any = load_policy(config, tokenizer, field)
    # `load_tokenizer` adds a template where there is none; only stages save such a template
    own = record or read_tokenizer(config, field).chat_template
    return model.to(device), tokenizer, record, bool(own)
