"""What `--help` of a stage prints: its groups and the knobs that people change first."""

from __future__ import annotations

import dataclasses
import textwrap

from rlhf.config.fields import sentences, summary, yaml_scalar
from rlhf.config.knobs import STAGES, groups_of
from rlhf.config.paths import CONF_DIR

EXAMPLES = {
    "sft": """\
  python -m rlhf.sft model.path=EleutherAI/pythia-410m dataset=alpaca dataset.path=train.jsonl
  python -m rlhf.sft -m seed=1,2 run_name=sw ...      a sweep: runs sw-seed-1 and sw-seed-2
""",
    "reward": """\
  python -m rlhf.reward dataset=ranked dataset.path=ranked.jsonl run_name=mine
  python -m rlhf.score path=runs/mine/reward/final data=answers.jsonl
                          writes the rows with their scores: answers.scored.jsonl
""",
    "ppo": """\
  python -m rlhf.ppo dataset=alpaca dataset.path=prompts.jsonl run_name=mine
  python -m rlhf.ppo scorer.path=my_module.my_score model.path=runs/mine/sft/final ...
""",
}
FIRST_KNOBS = {
    "sft": """run_name resume model.path model.chat_template dataset.path dataset.max_length
        batch_size trainer.num_train_epochs trainer.learning_rate precision""",
    "reward": """run_name resume dataset.path dataset.max_length reward.loss reward.center_coef
        batch_size trainer.num_train_epochs trainer.learning_rate precision""",
    "ppo": """run_name resume dataset.path ppo.num_updates ppo.batch_size ppo.response_length
        ppo.kl_coef ppo.learning_rate scorer.path evaluation.every""",
}


def stage_help(stage: str) -> str:
    """The answer to `python -m rlhf.<stage> --help`."""
    lines = [
        summary(STAGES[stage]),
        "",
        f"  python -m rlhf.{stage:<8}  the embedded demo (as recipe=demo), minutes on a laptop",
        EXAMPLES[stage],
        "Groups, chosen as group=choice:",
    ]
    for group in [*groups_of(STAGES[stage]), "recipe"]:
        choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        lines.append(_entry(group, ", ".join(choices)))
    lines.append("\nThe knobs that people change first, as key=value (here with their defaults):")
    for key in FIRST_KNOBS[stage].split():
        default, text = _default_and_text(stage, key)
        lines += [f"  {key}={default}", _entry("", text)]
    lines += [
        f"\nAll knobs with their meaning: {stage}.yaml and the groups' folders in\n{CONF_DIR}.",
        "--cfg job prints the whole configuration; -m runs a sweep (seed=1,2,3); --hydra-help says",
        "more.",
    ]
    return "\n".join(lines)


def _entry(name: str, text: str) -> str:
    """A name, and the text that belongs to it to the right of the name."""
    return textwrap.fill(text, 100, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)


def _default_and_text(stage: str, key: str) -> tuple[str, str]:
    owner: type = STAGES[stage]
    value = owner()
    *groups, name = key.split(".")
    for group in groups:
        field = next(f for f in dataclasses.fields(owner) if f.name == group)
        owner, value = field.metadata["group"], getattr(value, group)
    default = value[name] if isinstance(value, dict) else getattr(value, name)
    return yaml_scalar(default), sentences(owner)[name]
