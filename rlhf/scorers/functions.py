"""How a Python scorer is called: its parameters by their names, and asynchronous ones.

    def score(prompts, responses): ...              # any names: prompts come first
    def score(completions, answer, **columns): ...  # TRL's names; `answer` is a column of the rows

Each parameter but the first two is a column of the rows, or `response_ids`. `rlhf.scorers.call`
checks what comes back.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from rlhf.config import InputError
from rlhf.rubrics import Rubric

RESPONSES = ("responses", "completions")  # either name is that of the responses
GIVEN = ("prompts", *RESPONSES, "response_ids")


@dataclass
class Parameters:
    """The parameters of a Python scorer that are given by name."""

    required: list[str]
    optional: list[str]
    takes_all: bool  # has **kwargs
    in_order: bool  # prompts and responses are the first two arguments

    @property
    def columns(self) -> list[str]:
        """The columns that every call needs."""
        return [name for name in self.required if name not in GIVEN]

    @property
    def takes_ids(self) -> bool:
        return "response_ids" in (*self.required, *self.optional)


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Read the signature of a Python scorer; a class is read as its instances are called."""
    if isinstance(function, type) and inspect.isfunction(function.__call__):
        function = partial(function.__call__, None)
    try:
        found = list(inspect.signature(function).parameters.values())
    except ValueError:  # Python does not know the parameters of a built-in function
        return Parameters([], [], takes_all=False, in_order=True)
    first = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
    in_order = not any(p.name in RESPONSES for p in found) and (len(first) == 2 or not takes_all)
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if in_order:
        named = [p for p in named if p not in first]
    return Parameters(
        [p.name for p in named if p.default is p.empty],
        [p.name for p in named if p.default is not p.empty],
        takes_all,
        in_order,
    )


def call_function(
    function: Callable[..., Any],
    prompts: Sequence[Any],
    responses: Sequence[str],
    response_ids: list[list[int]] | None,
    columns: Mapping[str, Sequence[Any]],
) -> Any:
    """Call a Python scorer with what its parameters name, and wait for an asynchronous one.

    Args:
        columns: name -> a value for each response.
    """
    parameters = parameters_of(function)
    given = {**columns, "prompts": prompts, **dict.fromkeys(RESPONSES, responses)}
    if response_ids is not None:
        given["response_ids"] = response_ids
    wanted = [*parameters.required, *parameters.optional]
    if parameters.takes_all:
        wanted += [name for name in columns if name not in GIVEN]
        if not parameters.in_order:
            wanted += ["prompts", *([] if set(RESPONSES) & set(wanted) else RESPONSES)]
    named = {name: given[name] for name in wanted if name in given}
    first = (prompts, responses) if parameters.in_order else ()
    result = function(*first, **named)
    return _wait(result) if inspect.isawaitable(result) else result


def require_columns(
    label: str, function: Callable[..., Any] | Rubric, columns: Sequence[str]
) -> None:
    """Refuse a Python scorer with a parameter, or a rubric with a column, that no row has.

    Args:
        label: names the scorer in the message.
    """
    if isinstance(function, Rubric):
        missing = [name for name in function.columns if name not in columns]
        if missing:
            raise InputError(
                f"{label}: no row has the column `{missing[0]}`, which the rubric reads; the "
                f"columns are {', '.join(['prompt', *columns])}. Add it, or take another rubric"
            )
        return
    missing = [name for name in parameters_of(function).columns if name not in columns]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise InputError(
            f"{label}: no row has a column for its parameter{'s' * (len(missing) > 1)} {names}; "
            f"the columns are {', '.join(['prompt', *columns])}. Rename the parameter, give it a "
            "default, or add the column (a parameter for the prompts is called `prompts`, one for "
            "the responses `responses` or `completions`)"
        )


def _wait(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that a client of the user's can stay open; in a thread of its own,
    because a notebook runs a loop in the main one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
