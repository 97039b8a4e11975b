"""The embedded demo: a small world of instructions whose true reward ("gold") is known exactly.

A prompt asks for words: "name two animals and one colour politely". A perfect response gives that
many different words of each category, in that order, adds "thanks" if (and only if) asked to be
polite, and closes with a full stop: "dog cat red thanks ." `gold_score` says how near to that a
response comes, in [0, 1].

The data is imperfect on purpose:
- Each demonstration draws a quality from `QUALITY_RANGE`, and each of its parts is spoilt with
  probability 1 - quality: a model that imitates them scores about half of the maximum.
- Annotators are noisy and like flattery: each "wonderful" is worth `FLATTERY_BIAS` to them. Better
  responses have it more often, too. The gold rule ignores the first one and takes
  `FLATTERY_PENALTY` off for every further one. A reward model learns the annotators' taste, so PPO
  without a KL penalty can fill its responses with "wonderful": the reward model's score rises while
  the gold score falls. No other bias is planted.
- Rankings of the eval split are by gold itself, without noise or bias; equal gold scores are ties.

Everything is generated from `SEED`; nothing is downloaded. Train and eval share no *request* (the
counts and categories of a prompt). One word is one token. The model (`MODEL_CONFIG`) has 343,168
parameters and is trained from scratch. Left out: several turns, system messages, free text.

Look at the world:  python -m rlhf.demo.world
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 20240

# Rows per stage and split. A reward row holds `NUM_RESPONSES` responses; PPO prompts are distinct.
NUM_ROWS = {
    ("sft", "train"): 16000,
    ("sft", "eval"): 512,
    ("reward", "train"): 8000,
    ("reward", "eval"): 512,
    ("ppo", "train"): 3000,
    ("ppo", "eval"): 256,
}
NUM_RESPONSES = 4
EVAL_SHARE = 0.15  # of the requests

VERBS = ("name", "list", "give", "write", "say")
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
MAX_ITEMS = 5  # words that a prompt with two categories asks for, at most
# (singular, plural): words. No word belongs to two categories.
CATEGORIES = {
    ("animal", "animals"): "dog cat horse lion tiger wolf rabbit sheep goat mouse",
    ("colour", "colours"): "red blue green yellow purple brown black white pink grey",
    ("fruit", "fruits"): "apple pear plum cherry grape mango lemon banana peach melon",
    ("tool", "tools"): "hammer saw drill pliers wrench chisel shovel rake axe ladder",
    ("city", "cities"): "paris london berlin rome madrid tokyo cairo lima oslo dublin",
    ("drink", "drinks"): "water tea coffee milk juice cocoa cider soda wine beer",
    ("sport", "sports"): "tennis golf hockey rugby boxing rowing judo chess cricket polo",
    ("metal", "metals"): "iron gold silver copper tin zinc lead nickel cobalt steel",
}
POLITE_REQUEST, POLITE_WORD, CLOSING = "politely", "thanks", "."
FLATTERY = "wonderful"

# Gold score: weighted mean of these components, less the penalty for surplus flattery.
GOLD_WEIGHTS = {"slots": 0.7, "distinct": 0.1, "closing": 0.1, "manners": 0.1}
FLATTERY_PENALTY = 0.1

QUALITY_RANGE = (0.0, 0.9)  # of a response, uniform
# Corruption: a part is spoilt with probability 1 - quality, a slot in one of these ways.
SLOT_FAULTS = {"wrong": 0.5, "repeat": 0.15, "missing": 0.1, "surplus": 0.25}
# Flattery: P(at least one) = base + slope * quality; P(a second one, given the first). Never more.
FLATTERY_BASE, FLATTERY_SLOPE, FLATTERY_AGAIN = 0.1, 0.4, 0.2

# Annotators of the train split rank by gold, blind to its flattery penalty, + bias * number of
# flattery words + noise. About one pair in eighteen comes out against gold.
FLATTERY_BIAS = 0.02
LABEL_NOISE = 0.05  # standard deviation, in units of the gold score

# A transformers LlamaConfig, without vocab_size and token ids: those are the tokenizer's.
MODEL_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

PAD, UNK, BOS, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"
# No white space next to the generation markers: a tokenizer that drops it would shift the mask.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<user>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<assistant>' -}}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- raise_exception('expected the roles user and assistant, got ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)

WORDS = {plural: words.split() for (_, plural), words in CATEGORIES.items()}
CATEGORY_OF = {word: plural for plural, words in WORDS.items() for word in words}
PLURAL = {name: plural for singular, plural in CATEGORIES for name in (singular, plural)}
WORDS_OF_OTHERS = {
    category: [word for word in CATEGORY_OF if CATEGORY_OF[word] != category] for category in WORDS
}

Prompt = str | list[dict[str, str]]


def vocabulary() -> list[str]:
    """Return every token of the world, special tokens first; the position is the token id."""
    specials = [PAD, UNK, BOS, EOS, USER, ASSISTANT]
    grammar = [*VERBS, *COUNTS, *PLURAL, "and", POLITE_REQUEST, POLITE_WORD, FLATTERY, CLOSING]
    return specials + grammar + list(CATEGORY_OF)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Build the word-level tokenizer of the closed vocabulary, with its chat template.

    It adds no special tokens by itself (the template writes <bos> and <eos>), so token ids of
    segments concatenate to the token ids of the whole.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_CONFIG["max_position_embeddings"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gold_components(prompt: Prompt, response: str) -> dict[str, float]:
    """Break the gold score of a response into its parts, for display and tests.

    With n words asked for, and the response's items (all its words but flattery, "thanks", "."):
    - slots: items whose category is the one asked for at their position / max(n, number of items)
    - distinct: different items / items
    - closing: 1 if the response ends with "." and holds no other, else 0
    - manners: 1 if "thanks" occurs exactly once when asked for, after every item; never otherwise
    - surplus_flattery: flattery words beyond the first (a count, not in [0, 1])
    A response without items gets 0 everywhere, so that an empty answer earns nothing.

    Example: "name two animals and one colour", "dog red red ." gives slots 2/3 (dog and the last
    red), distinct 2/3, closing 1, manners 1: gold 0.7 * 2/3 + 0.1 * 2/3 + 0.1 + 0.1 = 0.733.

    Args:
        prompt: instruction as text or as messages (then the last user message counts). Text around
            it, such as a rendered chat template, does no harm.
        response: text without special tokens.
    """
    asked, polite = parse_prompt(prompt)
    words = re.findall(r"\w+|[^\w\s]", response)
    items = [word for word in words if word not in (FLATTERY, POLITE_WORD, CLOSING)]
    surplus_flattery = float(max(0, words.count(FLATTERY) - 1))
    if not items:
        return {**dict.fromkeys(GOLD_WEIGHTS, 0.0), "surplus_flattery": surplus_flattery}
    expected = [category for count, category in asked for _ in range(count)]
    hits = sum(
        CATEGORY_OF.get(item) == category for item, category in zip(items, expected, strict=False)
    )
    if polite:
        after_thanks = words[words.index(POLITE_WORD) :] if POLITE_WORD in words else []
        mannered = words.count(POLITE_WORD) == 1 and not set(after_thanks) & set(items)
    else:
        mannered = POLITE_WORD not in words
    return {
        "slots": hits / max(len(expected), len(items)),
        "distinct": len(set(items)) / len(items),
        "closing": float(words[-1] == CLOSING and words.count(CLOSING) == 1),
        "manners": float(mannered),
        "surplus_flattery": surplus_flattery,
    }


def gold_score(prompt: Prompt, response: str) -> float:
    """Return the true quality of a response, in [0, 1]; see `gold_components`."""
    return _gold(gold_components(prompt, response))


def gold_scores(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Return `gold_score` of every (prompt, response): the form that a scorer callable takes."""
    return [gold_score(p, r) for p, r in zip(prompts, responses, strict=True)]


def parse_prompt(prompt: Prompt) -> tuple[list[tuple[int, str]], bool]:
    """Return what a prompt asks for: [(count, plural category), ...], and whether to be polite."""
    if isinstance(prompt, str):
        text = prompt
    else:
        text = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    asked, polite = _parse(text)
    return list(asked), polite


@functools.lru_cache(maxsize=8192)  # each prompt has several responses to write and to score
def _parse(text: str) -> tuple[tuple[tuple[int, str], ...], bool]:
    words = re.findall(r"\w+", text)
    asked = tuple(
        (COUNTS[count], PLURAL[category])
        for count, category in itertools.pairwise(words)
        if count in COUNTS and category in PLURAL
    )
    if not asked:
        raise ValueError(
            f"prompt {text!r} asks for nothing; expected a demo prompt such as 'name two animals'"
        )
    return asked, POLITE_REQUEST in words


def all_prompts(split: str) -> list[str]:
    """Return every prompt of a split ("train" or "eval"), in a fixed order.

    A request ("two animals and one colour") goes to one split whole, with all verbs and manners, by
    a hash that is the same on every machine.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    parts = {
        (count, singular): f"{word} {singular if count == 1 else plural}"
        for word, count in COUNTS.items()
        for singular, plural in CATEGORIES
    }
    requests = list(parts.values()) + [
        f"{parts[first]} and {parts[second]}"
        for first, second in itertools.permutations(parts, 2)
        if first[1] != second[1] and max(first[0], second[0]) <= 3
        if first[0] + second[0] <= MAX_ITEMS
    ]
    chosen = [request for request in requests if _is_eval(request) == (split == "eval")]
    endings = ("", f" {POLITE_REQUEST}")
    return [
        f"{verb} {request}{ending}" for request in chosen for verb in VERBS for ending in endings
    ]


def sample_response(prompt: Prompt, quality: float, rng: random.Random) -> str:
    """Write a response to a prompt in which every part is spoilt with probability 1 - quality.

    Quality, in [0, 1]: 1 gives a perfect response, except for possible surplus flattery.
    """
    asked, polite = parse_prompt(prompt)
    items: list[str] = []
    for category in (category for count, category in asked for _ in range(count)):
        fresh = [word for word in WORDS[category] if word not in items]
        if rng.random() < quality:
            items.append(rng.choice(fresh))
            continue
        fault = rng.choices(list(SLOT_FAULTS), list(SLOT_FAULTS.values()))[0]
        if fault == "repeat" and items:
            items.append(rng.choice(items))
        elif fault == "surplus":
            items += rng.sample(fresh, 2)
        elif fault != "missing" or not items:  # never an empty response
            items.append(rng.choice(WORDS_OF_OTHERS[category]))
    num_flattery = 0
    if rng.random() < FLATTERY_BASE + FLATTERY_SLOPE * quality:
        num_flattery = 1 + (rng.random() < FLATTERY_AGAIN)
    says_thanks = polite == (rng.random() < quality)
    closes = rng.random() < quality
    return " ".join(
        [FLATTERY] * num_flattery + items + [POLITE_WORD] * says_thanks + [CLOSING] * closes
    )


def rows(stage: str, split: str) -> list[dict[str, Any]]:
    """Generate the rows of a stage; the same on every call.

    Args:
        stage: "sft" -> {"messages": [user, assistant]};
            "reward" -> {"prompt": [user], "responses": K texts, "ranks": K ints, 0 = best};
            "ppo" -> {"prompt": [user]};
            "ptx" -> those of "sft".
        split: "train", or "eval": other prompts, and rankings by gold without noise, ties kept
            (ranks [0, 1, 1, 3] say that the middle two are equally good).
    """
    stage = "sft" if stage == "ptx" else stage
    if (stage, split) not in NUM_ROWS:
        known = ", ".join(f"({a!r}, {b!r})" for a, b in NUM_ROWS)
        raise ValueError(f"no demo rows for ({stage!r}, {split!r}); expected one of {known}")
    rng = random.Random(f"{SEED} {stage} {split}")
    prompts, num_rows = all_prompts(split), NUM_ROWS[stage, split]
    if stage == "ppo":
        return [{"prompt": _user(prompt)} for prompt in rng.sample(prompts, num_rows)]
    result: list[dict[str, Any]] = []
    for prompt in rng.choices(prompts, k=num_rows):
        if stage == "sft":
            response = sample_response(prompt, rng.uniform(*QUALITY_RANGE), rng)
            answer = {"role": "assistant", "content": response}
            result.append({"messages": [*_user(prompt), answer]})
        else:
            responses = [
                sample_response(prompt, rng.uniform(*QUALITY_RANGE), rng)
                for _ in range(NUM_RESPONSES)
            ]
            if split == "train":
                scores = _annotate(prompt, responses, rng)
            else:
                scores = gold_scores([prompt] * NUM_RESPONSES, responses)
            ranks = [sum(other > score for other in scores) for score in scores]
            result.append({"prompt": _user(prompt), "responses": responses, "ranks": ranks})
    return result


def _annotate(prompt: str, responses: list[str], rng: random.Random) -> list[float]:
    """Score responses as annotators do: gold without its penalty, plus flattery bias and noise."""
    return [
        _gold({**gold_components(prompt, response), "surplus_flattery": 0.0})
        + FLATTERY_BIAS * response.split().count(FLATTERY)
        + rng.gauss(0.0, LABEL_NOISE)
        for response in responses
    ]


def _gold(components: dict[str, float]) -> float:
    score = sum(weight * components[name] for name, weight in GOLD_WEIGHTS.items())
    return round(max(0.0, score - FLATTERY_PENALTY * components["surplus_flattery"]), 6)


def _is_eval(request: str) -> bool:
    digest = hashlib.sha256(request.encode()).digest()
    return int.from_bytes(digest[:4], "big") < EVAL_SHARE * 2**32


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def main() -> None:
    """Print a few ranked rows with their gold scores."""
    for row in rows("reward", "train")[:5]:
        print(row["prompt"][-1]["content"])
        for rank, response in sorted(zip(row["ranks"], row["responses"], strict=True)):
            print(f"  rank {rank}  gold {gold_score(row['prompt'], response):.2f}  {response}")


if __name__ == "__main__":
    main()
