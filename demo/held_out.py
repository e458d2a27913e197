"""What the training text never contains and the evaluation asks for.

Both `evaluate.py` and `training/` import this file, so that the two cannot disagree.
"""

import hashlib

CITIES = [
    "Lisbon", "Nairobi", "Helsinki", "Bogota", "Hanoi", "Dublin", "Prague", "Manila",
    "Cairo", "Geneva", "Boston", "Kyoto", "Santiago", "Warsaw", "Delhi", "Tallinn",
    "Milan", "Perth", "Denver", "Havana",
]

PEOPLE = ["Sofia", "Hugo", "Marta", "Felix", "Yusuf", "Petra", "Diana", "Viktor"]

SUBJECTS = ["badger", "sailor", "panda", "turtle", "knight", "swan"]

# A timer is never set for these numbers of minutes in training.
MINUTES = [7, 18, 23, 36, 42, 55, 64, 77, 81, 95]


def is_held_out_pair(a: int, b: int) -> bool:
    """About a tenth of the unordered pairs below 100; `a + b` and `b + a` go together."""
    low, high = sorted((a, b))
    return hashlib.sha256(f"{low}+{high}".encode()).digest()[0] % 10 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    """Every ordered pair of numbers below 100 that training leaves out."""
    return [(a, b) for a in range(100) for b in range(100) if is_held_out_pair(a, b)]
