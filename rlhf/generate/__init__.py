"""Data from models: `python -m rlhf.generate` and its modes.

Left out: the page in which people rank the answers (`rlhf.rank`).
"""

from rlhf.generate.options import GenerateOptions
from rlhf.generate.sample import Answerer, Question, read_prompts, run
