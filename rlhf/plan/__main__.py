"""What a run needs: memory, what fits, time and cost. Loads no weights.

    python -m rlhf.plan model=llama-7b stage=ppo gpus=8 card=h100 price_per_hour=2.5
    python -m rlhf.plan model=runs/mine/sft/final stage=ppo memory=24 lora=true
    python -m rlhf.plan model=EleutherAI/pythia-2.8b stage=sft gpus=4 card=a100

A model is a known size (llama-7b, pythia-12b, ...), a directory, a config.json or a Hub id. Memory
is counted on the model's own code; time is a bound of the card, divided by utilisation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from rlhf.config import STAGES, InputError, knob
from rlhf.console import quiet_libraries, say, table
from rlhf.option_parser import check_options, run_command
from rlhf.plan.cards import CARDS, Card

if TYPE_CHECKING:
    from rlhf.plan.counting import Measured
    from rlhf.plan.launches import Setting

HOUR = 3600  # seconds


@dataclass
class PlanOptions:
    """The command line."""

    model: str
    """Known size, directory, config.json or Hub id."""
    stage: str = knob("ppo", choices=STAGES)
    """Stage to plan."""
    gpus: int = knob(1, ge=1)
    """Number of GPUs."""
    card: str = knob("h100", choices=tuple(CARDS))
    """GPU: its arithmetic, bandwidth and memory."""
    memory: float | None = knob(None, gt=0)
    """Memory of a GPU, GB (null: that of the card)."""
    lora: bool = False
    """true: as peft=lora."""
    dtype: str = knob("float32", choices=("float32", "bfloat16"))
    """Type of the stored weights of what trains, as model.dtype."""
    quantization: str | None = knob(None, choices=("8bit", "4bit"))
    """Linear layers below LoRA, as model.quantization; needs lora=true."""
    checkpointing: bool = False
    """true: as model.gradient_checkpointing=true."""
    critic: bool = True
    """false: PPO without a critic, such as ppo.advantage=rloo."""
    offload_frozen: bool = False
    """true: reference and reward model are in main memory, except while they are read."""
    share_base: bool = False
    """true: as ppo.share_base, adapters of each role on one base; needs lora=true."""
    stacked: bool = False
    """true: as ppo.base=stacked, the adapter of SFT apart from that base; needs share_base=true."""
    prompt_length: int = knob(256, ge=1)
    """Tokens of a prompt; in SFT and reward, of the first part of a row."""
    response_length: int = knob(256, ge=1)
    """Tokens of a response."""
    sampled_rows: int = knob(64, ge=1)
    """Responses that one GPU samples together, as ppo.rollout_batch_size."""
    gather: str = knob("auto", choices=("auto", "copy", "layers"))
    """How PPO samples from a policy in slices, as sampling.gather."""
    rows: int = knob(256_000, ge=1)
    """Rows, or episodes of PPO, to reckon the time of."""
    epochs: int = knob(4, ge=1)
    """Passes over the rows; in PPO, over each rollout."""
    utilisation: float = knob(0.4, gt=0, le=1)
    """Share of the card's limits that a run reaches."""
    price_per_hour: float | None = knob(None, ge=0)
    """Price of one GPU for an hour."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    return run_command(str(__doc__), PlanOptions, run, arguments)


def run(options: PlanOptions) -> None:
    """Print what a run needs.

    Raises:
        InputError: a value is not allowed, or the model is unknown or cannot be reckoned.
    """
    check_options(options)
    _check_rules(options)
    quiet_libraries()
    from rlhf.plan.sizes import find_settings

    model_settings = find_settings(options.model)  # refuses before torch is imported
    from rlhf.plan.counting import measure
    from rlhf.plan.launches import Setting
    from rlhf.plan.work import Shape, seconds_of_phases

    card = CARDS[options.card]
    names = [field.name for field in fields(Setting)]
    setting = Setting(**{name: getattr(options, name) for name in names})
    context = getattr(model_settings.get_text_config(), "max_position_embeddings", None)
    if context is not None and setting.length > context:
        raise InputError(
            f"prompt_length={options.prompt_length} + response_length={options.response_length} "
            f"exceed the context of {options.model}, {context} tokens; lower one of them"
        )
    stored = options.lora, options.dtype, options.quantization
    model = measure(model_settings, setting.length, *stored)
    if options.stage == "ppo" and not model.cache_per_token:
        raise InputError(
            f"model={options.model}: model_type={model_settings.model_type} keeps no keys and "
            "values, with which PPO samples; take another family, or stage=sft"
        )
    _show_model(model, model_settings, options)
    _show_memory(model, setting, card, options)
    phases = seconds_of_phases(Shape.of(model), setting, card, options.rows, options.epochs)
    _show_time(phases, setting, options)
    _show_known(options, card)


def _check_rules(options: PlanOptions) -> None:
    for name in ("share_base", "stacked", "offload_frozen"):
        if getattr(options, name) and options.stage != "ppo":
            raise InputError(f"{name}=true is about the models of PPO; set stage=ppo")
    if options.share_base and not options.lora:
        raise InputError("share_base=true keeps adapters on one base; set lora=true")
    if options.quantization and not options.lora:
        raise InputError(
            f"quantization={options.quantization} trains adapters alone; set lora=true"
        )
    if options.stacked and not options.share_base:
        raise InputError("stacked=true says what one base for all roles holds; set share_base=true")


def _show_model(model: Measured, model_settings: Any, options: PlanOptions) -> None:
    """Print the size of the model, and that its files are quantised."""
    say(
        f"{options.model}: {model.parameters / 1e9:.3f} B parameters, {model.trained / 1e9:.3f} B "
        f"of them trained; rows of {options.prompt_length} + {options.response_length} tokens\n"
    )
    packed = getattr(model_settings, "quantization_config", None)
    if packed:
        packed = packed if isinstance(packed, dict) else packed.to_dict()
        say(
            f"its files are quantised ({packed.get('quant_method')}): reckoned as if they held "
            f"{options.dtype}; lora=true quantization=4bit packs them here\n"
        )


def _show_memory(model: Measured, setting: Setting, card: Card, options: PlanOptions) -> None:
    """Print the memory of each role, then what fits, and where PPO has no room for a copy."""
    from rlhf.plan.launches import chosen_gather, estimate, launches, main_memory, rows_that_fit

    parts: list[tuple[Any, ...]] = []
    fits: list[tuple[Any, ...]] = []
    memory = options.memory or card.memory
    in_layers, room = [], int(memory * 1e9)
    for launch in launches(setting):
        chosen = replace(setting, gather=chosen_gather(model, setting, launch, room))
        in_layers += [launch] * (chosen.gather == "layers")
        found = estimate(model, chosen, launch)
        for role, part in found.models.items():
            sizes = (part.weights, part.gradients, part.adam, part.activations)
            parts.append((launch, role, *(round(size / 1e9, 1) for size in sizes)))
        rows = rows_that_fit(model, chosen, launch, room)
        outside = main_memory(model, chosen, launch)
        gigabytes = [round(size / 1e9, 1) for size in (found.total, outside)]
        room_left = "yes" if rows else "no", rows, rows * setting.length
        fits.append((launch, *gigabytes, found.moment(), *room_left))
    columns = ("weights", "gradients", "Adam", "activations of a row")
    say(table(parts, ("GB of each GPU", "", *columns)))
    header = ("GB of each GPU, 1 row", "GB of main memory", "most in", f"fits {memory:g} GB")
    say("\n" + table(fits, ("", *header, "rows at once", "tokens")))
    if in_layers:
        _show_gathering(" and ".join(in_layers), model, setting, card, options.rows)


def _show_gathering(
    launches: str, model: Measured, setting: Setting, card: Card, rows: int
) -> None:
    """Print what sampling from slices takes."""
    from rlhf.plan.launches import gathered_per_token
    from rlhf.plan.work import seconds_of_gathering

    size = gathered_per_token(model, setting)
    token, run = seconds_of_gathering(size, setting, card, rows)
    say(
        f"\n{launches}: PPO samples without a whole copy of the policy, layer by layer; each GPU "
        f"gathers {size / 1e9:.1f} GB for each token, in at least {1000 * token:.1f} ms at "
        f"{card.link:.0f} GB/s: {run / HOUR:.1f} hours more than below"
    )


def _show_time(phases: dict[str, float], setting: Setting, options: PlanOptions) -> None:
    """Print hours, rate and cost of the run."""
    total = sum(phases.values())
    times = [
        (phase, seconds / HOUR, at_work := seconds / options.utilisation / HOUR, at_work / 24)
        for phase, seconds in [*phases.items(), ("all", total)]
    ]
    what = "episodes" if options.stage == "ppo" else "rows"
    header = f"hours for {options.rows:,} {what} on {options.gpus} x {options.card}"
    columns = ("at the card's limits", f"at {options.utilisation:.0%} of them", "in days")
    say("\n" + table(times, (header, *columns)))
    passes = 1 if options.stage == "ppo" else options.epochs
    rate = passes * options.rows * setting.length / total
    say(f"\nat most {rate:,.0f} tokens/s, about {rate * options.utilisation:,.0f}")
    if options.price_per_hour is not None:
        say(f"cost: about {_cost(total, options):,.0f}")


def _show_known(options: PlanOptions, card: Card) -> None:
    """Print hours and cost of published runs on these GPUs."""
    from rlhf.plan.launches import Setting
    from rlhf.plan.sizes import find_settings
    from rlhf.plan.work import KNOWN, Shape, seconds_of_phases

    rows = []
    for run in KNOWN:
        setting = Setting(run.stage, options.gpus, run.prompt, run.response)
        shape = Shape.of_settings(find_settings(run.size))
        total = sum(seconds_of_phases(shape, setting, card, run.rows, run.epochs).values())
        cost = None if options.price_per_hour is None else round(_cost(total, options))
        hours = total / options.utilisation / HOUR
        rows.append((run.name, run.rows, run.epochs, hours, hours / 24, cost))
    columns = (
        "rows or episodes",
        "epochs",
        f"hours at {options.utilisation:.0%}",
        "in days",
        "cost",
    )
    say("\n" + table(rows, (f"on {options.gpus} x {options.card}", *columns)))


def _cost(seconds: float, options: PlanOptions) -> float:
    assert options.price_per_hour is not None
    return seconds / options.utilisation / HOUR * options.gpus * options.price_per_hour


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
