"""The training text: which skills, how often, and their tokens with a mask of what is learnt.

Everything follows from a seed. Nothing is read from outside: the text is generated.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

import chat
import facts
import stories
import sums
import tool_examples
import words
from conversation import Example, Exchange, assistant, user

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful AI assistant.", "You are a friendly assistant.",
    "Answer briefly.", "You are the demo model of mlx-cluster.", "Be kind and clear.", "You are a careful assistant. Answer in one sentence.",
]
# Shares of the examples, not of the tokens.
PLAIN_SKILLS = [(sums.exchange, 60), (stories.exchange, 11), (facts.about, 16), (facts.talk, 9), (facts.unknown, 6)]
TOOL_SKILLS = [
    (tool_examples.call, 50), (tool_examples.session, 40), (tool_examples.result, 8), (tool_examples.unfitting, 24),
    (tool_examples.none_offered, 5),
]


def _system(rng: random.Random) -> list[dict]:
    if rng.random() < 0.75:
        return []
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]


def _pick(rng: random.Random, weighted: list) -> object:
    return rng.choices([skill for skill, _ in weighted], [weight for _, weight in weighted])[0]


def plain(rng: random.Random, turns: int) -> Example:
    """One to three turns without tools."""
    messages = _system(rng)
    exchanges: list[Exchange] = [_pick(rng, PLAIN_SKILLS)(rng) for _ in range(turns)]
    for exchange in exchanges[:-1]:
        messages += [user(exchange.question), assistant(exchange.answer)]
    last = exchanges[-1]
    is_sum = last.thought.endswith(".") and "carry" in last.thought
    thinking = rng.random() < (0.4 if is_sum else 0.12)
    return Example(messages + [user(last.question)], last.answer, thought=last.thought if thinking else None)


def with_tools(rng: random.Random) -> Example:
    before = _system(rng)
    if rng.random() < 0.12:
        before += tool_examples.earlier_call(rng)
    return _pick(rng, TOOL_SKILLS)(rng, before)


def example(rng: random.Random, tools_share: float) -> Example:
    if rng.random() < tools_share:
        return with_tools(rng)
    return plain(rng, rng.choices([1, 2, 3], [80, 14, 6])[0])


def text(ex: Example) -> tuple[str, str]:
    """The prompt, and what the assistant adds to it."""
    prompt = chat.prompt(ex.messages, ex.tools, ex.thought is not None, ex.compact)
    thought = f"<think>\n{ex.thought}\n</think>\n\n" if ex.thought is not None else ""
    return prompt, thought + ex.answer + "<|im_end|>"


@dataclass
class Tokens:
    """Token ids and, for each, the weight of the loss in predicting it (0: not learnt)."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Turns examples into tokens; knows which tokens the assistant has to learn."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.start = tokenizer.token_to_id("<|im_start|>")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.endoftext = tokenizer.token_to_id("<|endoftext|>")
        self.assistant = tokenizer.encode("assistant\n").ids
        self.digits = {tokenizer.token_to_id(str(d)) for d in range(10)}

    def encode(self, ex: Example) -> Tokens:
        prompt, answer = text(ex)
        head = self.tokenizer.encode(prompt).ids
        tail = self.tokenizer.encode(answer).ids
        weights = self._earlier_turns(head) + [1.0] * len(tail)
        return Tokens(head + tail, weights)

    def _earlier_turns(self, ids: list[int]) -> list[float]:
        """Earlier turns of the assistant count too, but for their first token: there the
        generation prompt would have put an empty thought, which the template leaves out."""
        weights = [0.0] * len(ids)
        opening = [self.start] + self.assistant
        for at in [i for i, t in enumerate(ids) if t == self.start]:
            if ids[at:at + len(opening)] != opening or self.end not in ids[at:]:
                continue
            for i in range(at + len(opening) + 1, ids.index(self.end, at) + 1):
                weights[i] = 1.0
        return weights

    def drill(self, rng: random.Random, count: int) -> Tokens:
        """Bare sums; only the digits of the results are learnt, the operands are chance."""
        ids, weights = [self.endoftext], [0.0]
        for line in sums.drill(rng, count).split("\n"):
            head, result = line.split("= ")
            head_ids, tail_ids = self.tokenizer.encode(head + "=").ids, self.tokenizer.encode(" " + result).ids
            newline = self.tokenizer.encode("\n").ids
            ids += head_ids + tail_ids + newline
            weights += [0.0] * len(head_ids) + [1.0] * len(tail_ids) + [0.0] * len(newline)
        return Tokens(ids, weights)

    def repetition(self, rng: random.Random, length: int) -> Tokens:
        """Something random, and then the same again: the shortest way to learn to copy.

        Either the same tokens in the same order, or the same names in another order; of a name the
        first token cannot be known and is not learnt.
        """
        if rng.random() < 0.5:
            unit = [rng.randrange(self.endoftext) for _ in range(rng.randint(8, max(8, length // 3)))]
            copies = -(-length // len(unit))
            ids, weights = unit * copies, [0.0] * len(unit) + [0.5] * (len(unit) * (copies - 1))
        else:
            names = [self.tokenizer.encode(words.invented(rng) + rng.choice([".", ",", '",', '"}}\n'])).ids for _ in range(rng.randint(3, 8))]
            ids, weights = [t for name in names for t in name], [0.0] * sum(map(len, names))
            while len(ids) < length:
                name = rng.choice(names)
                ids, weights = ids + name, weights + [0.0] + [0.5] * (len(name) - 1)
        return Tokens(([self.endoftext] + ids)[:length], ([0.0] + weights)[:length])


def sample_texts(seed: int, count: int) -> list[str]:
    """Text for training the tokenizer."""
    rng = random.Random(seed)
    return ["".join(text(example(rng, 0.5))) for _ in range(count)]
