"""Packs examples into rows of fixed length.

Each step sees short rows (chats without tools) and long rows (chats with tools). A row holds several
examples that do not see each other; what is left of it is filled with bare sums and repetitions.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import corpus
from corpus import Encoder, Tokens

DRILL_TOKENS = 14
# Short rows that hold nothing but repetitions.
REPETITION_ROWS = 1


@dataclass(frozen=True)
class Shape:
    rows: int
    length: int
    # How many tokens of these rows are learnt at most.
    learnt: int


class Batch(NamedTuple):
    """`ids` and the arrays beside it are flat over all rows; `picked` are the places whose next
    token is learnt, with that token and its weight."""

    ids: np.ndarray
    segments: tuple[np.ndarray, ...]
    picked: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def pack(examples: list[Tokens], rows: int, length: int) -> list[list[Tokens]]:
    """Fills rows, longest example first, each into the fullest row that still takes it. Returns the rows."""
    packed: list[list[Tokens]] = [[] for _ in range(rows)]
    room = [length] * rows
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        fitting = [r for r in range(rows) if room[r] >= len(example.ids)]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
            packed[row].append(example)
            room[row] -= len(example.ids)
    return packed


class Batches:
    """An endless, seeded stream of batches."""

    def __init__(self, encoder: Encoder, seed: int, short: Shape, long: Shape):
        self.encoder = encoder
        self.rng = random.Random(seed)
        self.short, self.long = short, long

    def _examples(self, shape: Shape, tools_share: float) -> list[Tokens]:
        """Enough examples to fill the rows; those that are left over are dropped, in a random choice of lengths."""
        examples, total = [], 0
        while total < shape.rows * shape.length:
            example = self.encoder.encode(corpus.example(self.rng, tools_share))
            if len(example.ids) <= shape.length:
                examples.append(example)
                total += len(example.ids)
        return examples

    def _filler(self, room: int) -> Tokens:
        if self.rng.random() < 0.4 and room >= 30:
            return self.encoder.repetition(self.rng, room)
        return self.encoder.drill(self.rng, room // DRILL_TOKENS)

    def _rows(self, shape: Shape, tools_share: float) -> list[list[Tokens]]:
        rows = pack(self._examples(shape, tools_share), shape.rows, shape.length)
        for row in rows:
            room = shape.length - sum(len(e.ids) for e in row)
            if room >= DRILL_TOKENS:
                row.append(self._filler(room))
        return rows

    def next(self) -> Batch:
        short = self._rows(self.short, 0.0)
        for row in range(REPETITION_ROWS):
            short[row] = [self.encoder.repetition(self.rng, self.short.length)]
        return assemble([(short, self.short), (self._rows(self.long, 0.95), self.long)])


def assemble(groups: list[tuple[list[list[Tokens]], Shape]]) -> Batch:
    all_ids, all_segments, picked, targets, weights = [], [], [], [], []
    start = 0
    for rows, shape in groups:
        ids = np.zeros((shape.rows, shape.length), np.int32)
        segments = np.full((shape.rows, shape.length), -1, np.int32)
        learnt = []
        for r, row in enumerate(rows):
            at = 0
            for s, example in enumerate(row):
                stop = min(at + len(example.ids), shape.length)
                ids[r, at:stop] = example.ids[: stop - at]
                segments[r, at:stop] = s
                for i in range(1, stop - at):
                    if example.weights[i] > 0:
                        learnt.append((start + r * shape.length + at + i - 1, example.ids[i], example.weights[i]))
                at = stop
        learnt = (learnt + [(start, 0, 0.0)] * shape.learnt)[: shape.learnt]
        for values, column in zip((picked, targets, weights), zip(*learnt)):
            values += column
        all_ids.append(ids.reshape(-1))
        all_segments.append(segments)
        start += ids.size
    return Batch(
        np.concatenate(all_ids), tuple(all_segments), np.array(picked, np.int32),
        np.array(targets, np.int32), np.array(weights, np.float32),
    )
