"""Which model answers or writes, from the command line: a directory, or a model at an endpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rlhf.config import NORMALIZATIONS, EndpointConfig, InputError, ScorerConfig, knob
from rlhf.http_endpoint import check_endpoint
from rlhf.policy import PolicyOptions, check_policies

HERE = ("top_k", "chat_template")  # options that no endpoint is sent


@dataclass(kw_only=True)
class AuthorOptions(PolicyOptions):
    """Options of every mode in which a model writes data."""

    path: str | None = None  # type: ignore[assignment]
    """The model that writes: stage directory, other model directory or Hub id."""
    url: str | None = None
    """Or an OpenAI-compatible endpoint that writes, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """Name of the model at url."""
    out: str | None = None
    """File to write."""
    key_env: str | None = None
    """Environment variable that holds the key of the endpoint; the key is never written."""
    timeout: float = knob(300.0, gt=0)
    """Seconds to wait for an answer of the endpoint."""
    retries: int = knob(5, ge=0)
    """Number of further tries after no answer, a broken one, 429 or 5xx."""
    num_requests: int = knob(8, ge=1)
    """Requests that are under way at once."""
    batch_size: int = knob(8, ge=1)
    """Answers of the model at path that are sampled together."""

    @property
    def endpoint(self) -> EndpointConfig:
        names = ("model", "url", "key_env", "timeout", "retries", "num_requests")
        return EndpointConfig(**{name: getattr(self, name) for name in names})


@dataclass(kw_only=True)
class GenerateOptions(AuthorOptions):
    """The command line."""

    path: str | None = None
    """The model that answers: stage directory, other model directory or Hub id."""
    url: str | None = None
    """Or an OpenAI-compatible endpoint that answers, such as http://127.0.0.1:8000/v1."""
    prompts: str
    """Prompts to answer: a .jsonl, .json, .csv or .parquet file, or a .txt file of lines."""
    out: str | None = None
    """File to write (default: <name>.answers.jsonl in the folder of the prompts)."""
    samples_per_prompt: int = knob(1, ge=1)
    """Answers to each prompt."""
    best_of: str | None = None
    """Reward model (final/ of a reward stage, or any sequence classifier with one label) that
    chooses one of the answers to each prompt."""
    normalize: str = knob(ScorerConfig().normalize, choices=NORMALIZATIONS)
    """Scale of the scores of best_of."""
    batch_size: int = knob(32, ge=1)
    """Answers sampled together."""

    @classmethod
    def like(cls, options: Any, **own: Any) -> GenerateOptions:
        """The options of another command that have the same names, but for some `own` ones."""
        names = [field.name for field in fields(cls) if hasattr(options, field.name)]
        return cls(**({name: getattr(options, name) for name in names} | own))


def check_author(options: AuthorOptions, prefix: str = "") -> None:
    """Check, before a model loads, that there is one, and one only.

    Args:
        prefix: of the names of its options, for messages.
    """
    path, url, model = (f"{prefix}{name}" for name in ("path", "url", "model"))
    if bool(options.path) == bool(options.url):
        given = "both are given" if options.path else "neither is given"
        raise InputError(
            f"add {path}=<model directory>, or {url}=<endpoint> and {model}=<name>; {given}"
        )
    if options.path:
        check_policies(options, {path: options.path})
        return
    here = [name for name in HERE if getattr(options, name) is not None]
    if here:
        raise InputError(f"{here[0]} is for a model at {path}, not for {url}; leave it out")
    if not options.model:
        raise InputError(f"{model} is missing; add {model}=<name of the model at {options.url}>")
    check_endpoint(str(options.url), options.endpoint, url)
