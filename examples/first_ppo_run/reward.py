"""The reward of docs/first-ppo-run.md: 0 for twelve words, lower for fewer and for more."""


def twelve_words(prompts, responses):
    return [-abs(len(response.split()) - 12) / 12 for response in responses]
