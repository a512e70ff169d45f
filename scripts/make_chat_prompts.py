"""General chat prompts, to warm a drafter up on: requests of many kinds about many subjects.

Every request is a template and a subject. The held-out ones are about other subjects. They are what
a small instruct model is asked, not a test of it; responses are the model's own. Leaves out tasks
with answers, which reasoning-gym has.

    python scripts/make_chat_prompts.py --train runs/chat/train.jsonl \\
        --held_out runs/chat/held_out.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonargparse

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "explain": (
        (
            "What is {}?",
            "Explain {} to a ten-year-old.",
            "Why does {} matter? Answer in three sentences.",
            "Give me a short introduction to {}.",
            "What are common misunderstandings about {}?",
            "List five facts about {}.",
            "Write three questions that test whether somebody has understood {}, with answers.",
            "Summarize what is known about {} in one paragraph.",
            "How did people learn about {}, and when?",
            "Compare {} with something from daily life.",
        ),
        (
            *("photosynthesis", "gravity", "inflation", "the water cycle", "plate tectonics"),
            *("vaccines", "black holes", "electric current", "evolution", "the greenhouse effect"),
            *("democracy", "supply and demand", "the immune system", "earthquakes", "tides"),
            *(
                "prime numbers",
                "probability",
                "fractions",
                "the Pythagorean theorem",
                "percentages",
            ),
            *("compound interest", "recycling", "solar energy", "batteries", "rainbows"),
            *("the digestive system", "sleep", "memory", "magnets", "sound waves"),
            *("volcanoes", "glaciers", "the moon", "comets", "photography"),
            *("encryption", "search engines", "neural networks", "binary numbers", "compilers"),
            *("the printing press", "the Silk Road", "the Roman aqueducts", "the Olympic Games"),
            *("the steam engine", "antibiotics", "the periodic table", "atoms", "chemical bonds"),
            *("migration of birds", "honey bees", "coral reefs", "rain forests", "deserts"),
            *("the heart", "vitamins", "muscles", "the human eye", "DNA"),
            *("taxes", "insurance", "a budget", "a contract", "copyright"),
            *("meditation", "body language", "habits", "procrastination", "teamwork"),
        ),
    ),
    "advise": (
        (
            "How do I {}?",
            "I want to {}. What should I do first?",
            "Give me a step-by-step plan to {}.",
            "What mistakes should I avoid when I {}?",
            "I have one week to {}. Make a day-by-day schedule.",
            "Name five tips for somebody who wants to {}.",
            "My friend wants to {} but is afraid to fail. What could I tell her?",
        ),
        (
            *("learn a new language", "bake bread", "plant tomatoes", "write a short story"),
            *("prepare for a job interview", "run five kilometres", "save money every month"),
            *("paint a room", "learn to play the guitar", "organize a birthday party"),
            *("clean a bicycle", "train a puppy", "read more books", "make new friends"),
            *("fix a leaking tap", "cook a vegetable soup", "learn to swim", "start a blog"),
            *("give a speech", "plan a trip to the mountains", "study for a mathematics exam"),
            *("wake up earlier", "grow herbs on a balcony", "write a letter of complaint"),
            *("learn programming", "repair a torn shirt", "take better photographs"),
            *("set up a home office", "eat less sugar", "teach a child to read"),
        ),
    ),
    "write": (
        (
            "Write a short poem about {}.",
            "Write a story of about a hundred words about {}.",
            "Write a dialogue between two people about {}.",
            "Write an email to a colleague about {}.",
            "Describe {} in vivid words.",
            "Write a product description for {}.",
            "Write a diary entry about {}.",
            "Invent a riddle about {}.",
        ),
        (
            *("an old lighthouse", "the first snow", "a lost key", "a garden in spring"),
            *("a train journey at night", "a broken umbrella", "a friendly robot", "the sea"),
            *("a market in the morning", "an empty school", "a cat that cannot sleep"),
            *(
                "a wooden chair",
                "a thunderstorm",
                "a letter that arrived too late",
                "a mountain hut",
            ),
            *("a cup of tea", "a long bridge", "a river that ran dry", "a clock without hands"),
            *("a new neighbour", "a paper boat", "the last day of summer", "a forgotten song"),
            *("a red bicycle", "a library", "a kite", "a walk in the fog", "a small bakery"),
        ),
    ),
    "code": (
        (
            "Write a Python function that {}.",
            "Write a Python function that {}, and explain each line.",
            "Write three unit tests for a Python function that {}.",
        ),
        (
            *("reverses a string", "counts the vowels in a string", "finds the largest number"),
            *("checks whether a number is prime", "sorts a list of names", "sums the digits of n"),
            *("computes a factorial", "removes duplicates from a list", "merges two dictionaries"),
            *("reads a file line by line", "converts Celsius to Fahrenheit", "flattens a list"),
            *("finds common elements of two lists", "checks for a palindrome", "counts words"),
            *("computes the Fibonacci numbers", "transposes a matrix", "shuffles a deck of cards"),
            *("validates an email address", "finds the second largest number in a list"),
        ),
    ),
}
"""By kind: templates, and the subjects that fill them."""

HELD_OUT_SHARE = 0.1
"""Of the subjects of each kind."""


@dataclass(frozen=True, kw_only=True)
class ChatPrompts:
    """What to write."""

    train: Path
    """JSON Lines file of {prompt, answer}; answers are empty: the model gives its own."""
    held_out: Path
    """The same, of requests about other subjects."""
    seed: int = 0
    """Of the choice of the subjects held out, and of the order."""


def make_prompts(seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts, shuffled; they share templates, but no subject."""
    rng = random.Random(f"chat prompts/{seed}")
    train: list[str] = []
    held_out: list[str] = []
    for templates, subjects in KINDS.values():
        shuffled = rng.sample(subjects, len(subjects))
        num_held_out = round(len(subjects) * HELD_OUT_SHARE)
        held_out += _filled(templates, shuffled[:num_held_out])
        train += _filled(templates, shuffled[num_held_out:])
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _filled(templates: Sequence[str], subjects: Sequence[str]) -> list[str]:
    return [template.format(subject) for subject in subjects for template in templates]


def run(options: ChatPrompts) -> None:
    """Write both files, and say how many prompts each has."""
    for path, prompts in zip(
        (options.train, options.held_out), make_prompts(options.seed), strict=True
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"prompt": prompt, "answer": ""}) for prompt in prompts)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{len(prompts)} prompts in {path}")


if __name__ == "__main__":
    run(jsonargparse.auto_cli(ChatPrompts, as_positional=False))
