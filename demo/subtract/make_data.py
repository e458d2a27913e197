"""Writes a data set for subtraction, which the demo model cannot do: `python3 demo/subtract/make_data.py --to data/subtract`.

{train,valid,test}.jsonl in mlx-lm's completions form. Only a - b with 0 <= b <= a < 100 is asked, so no answer is negative. A tenth of
the pairs (those that the model has never added either, see `demo/held_out.py`) occur in valid.jsonl and test.jsonl alone, each in one of
the two. Needs the standard library only; the same seed gives the same bytes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from held_out import is_held_out_pair

PHRASINGS = [
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "{a} - {b} = ?",
]

PAIRS = [(a, b) for a in range(100) for b in range(a + 1)]
VALID_PAIRS = 100


def answer(a: int, b: int) -> str:
    """The ones modulo ten, the tens, and the result, in words like those that the model adds by columns with."""
    borrowed = int(a % 10 < b % 10)
    ones = f"{a % 10} - {b % 10} = {(a - b) % 10}, borrow {borrowed}."
    tens = f"{a // 10} - {b // 10} - {borrowed} = {(a - b) // 10}."
    return f"{ones}\n{tens}\n{a} - {b} = {a - b}."


def row(rng: random.Random, a: int, b: int) -> dict[str, str]:
    return {"prompt": rng.choice(PHRASINGS).format(a=a, b=b), "completion": answer(a, b)}


def splits(rng: random.Random, rows: int) -> dict[str, list[dict[str, str]]]:
    """Every training pair about equally often, in random order and words."""
    known = [pair for pair in PAIRS if not is_held_out_pair(*pair)]
    unknown = [pair for pair in PAIRS if is_held_out_pair(*pair)]
    train = []
    while len(train) < rows:
        train += rng.sample(known, min(len(known), rows - len(train)))
    rng.shuffle(unknown)
    pairs = {"train": train, "valid": unknown[:VALID_PAIRS], "test": unknown[VALID_PAIRS:]}
    return {name: [row(rng, a, b) for a, b in asked] for name, asked in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("data/subtract"), help="folder to write")
    parser.add_argument("--rows", type=int, default=5_600, help="rows of train.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.to.mkdir(parents=True, exist_ok=True)
    for name, rows in splits(random.Random(args.seed), args.rows).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.to / f"{name}.jsonl").write_text(text)
        print(f"{args.to / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
