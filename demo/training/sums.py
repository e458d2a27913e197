"""Adding two numbers below 100."""

import random

from conversation import Exchange
from held_out import is_held_out_pair

PHRASINGS = [
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Calculate {a} + {b}.",
    "Compute {a}+{b}.",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "{a} + {b}",
    "What is the sum of {a} and {b}?",
    "Can you add {a} and {b}?",
    "what is {a} + {b}",
]

TRAINING_PAIRS = [(a, b) for a in range(100) for b in range(100) if not is_held_out_pair(a, b)]


# Few pairs have a number of one digit, and they look different: ask for them more often.
SMALL_PAIRS = [(a, b) for a, b in TRAINING_PAIRS if min(a, b) < 10]


def pair(rng: random.Random) -> tuple[int, int]:
    return rng.choice(SMALL_PAIRS if rng.random() < 0.2 else TRAINING_PAIRS)


def answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def columns(a: int, b: int) -> str:
    """The steps of adding by columns, ones first."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"{a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}.\n"
        f"{a // 10} + {b // 10} + {carry} = {tens}."
    )


def exchange(rng: random.Random) -> Exchange:
    a, b = pair(rng)
    question = rng.choice(PHRASINGS).format(a=a, b=b)
    return Exchange(question, answer(a, b), columns(a, b))


def drill(rng: random.Random, count: int) -> str:
    """Bare sums, a cheap way to see many of them early in training."""
    return "\n".join(answer(*pair(rng)) for _ in range(count))
