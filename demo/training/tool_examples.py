"""Conversations with tools: calling one, not calling one, and stating a result."""

import json
import random

import facts
import stories
import sums
from conversation import Example, assistant, user
import words
from tool_kinds import KINDS, Argument, ToolKind, Values

ADDER = next(kind for kind in KINDS if kind.names[0] == "add")


def _invented(rng: random.Random) -> str:
    parts = rng.choice([1, 1, 2])
    return "_".join(words.invented(rng).lower() for _ in range(parts))


class Offer:
    """A kind of tool under one choice of names, as a request would offer it."""

    def __init__(self, kind: ToolKind, rng: random.Random):
        self.kind = kind
        style = rng.choices(["usual", "mixed", "invented"], [35, 45, 20])[0]
        self.name = {
            "usual": kind.names[0],
            "mixed": rng.choice(kind.names),
            "invented": _invented(rng),
        }[style]
        self.argument_names = {a.key: self._argument_name(rng, a, style) for a in kind.arguments}
        # An invented name says nothing: then the description has to.
        self.schema = self._schema(rng, described=style == "invented" or rng.random() < 0.75)

    def _argument_name(self, rng: random.Random, argument: Argument, style: str) -> str:
        if style == "invented" and len(self.kind.arguments) == 1 and rng.random() < 0.6:
            return _invented(rng)
        return argument.names[0] if style == "usual" else rng.choice(argument.names)

    def _schema(self, rng: random.Random, described: bool) -> dict:
        arguments_described = rng.random() < 0.4
        properties = {}
        for argument in self.kind.arguments:
            kind = "number" if argument.type == "integer" and rng.random() < 0.3 else argument.type
            properties[self.argument_names[argument.key]] = {"type": kind}
            if arguments_described and rng.random() < 0.5:
                properties[self.argument_names[argument.key]]["description"] = argument.description
        parameters = {"type": "object", "properties": properties}
        if rng.random() < 0.8:
            parameters["required"] = list(properties)
        if rng.random() < 0.1:
            parameters["additionalProperties"] = False
        function = {"name": self.name, "parameters": parameters}
        if described:
            ending = rng.choice(["", "", "."])
            function = {"name": self.name, "description": self.kind.description + ending, "parameters": parameters}
        return {"type": "function", "function": function}

    def arguments(self, values: Values) -> dict:
        return {self.argument_names[a.key]: values[a.key] for a in self.kind.arguments}

    def call_text(self, values: Values) -> str:
        call = json.dumps({"name": self.name, "arguments": self.arguments(values)}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>"


def offers(rng: random.Random, needed: ToolKind | None, avoid: ToolKind | None = None) -> list[Offer]:
    """One to four tools with distinct names, among them the needed one."""
    count = rng.choices([1, 2, 3, 4], [5, 3, 2, 1])[0]
    others = [k for k in KINDS if k is not needed and k is not avoid]
    kinds = rng.sample(others, count - (needed is not None))
    if needed is not None:
        kinds.append(needed)
    rng.shuffle(kinds)
    return [Offer(kind, rng) for kind in kinds]


def _example(rng: random.Random, messages: list[dict], answer: str, chosen: list[Offer], thought: str) -> Example:
    return Example(
        messages,
        answer,
        tools=[offer.schema for offer in chosen],
        thought=thought if rng.random() < 0.15 else None,
        compact=rng.random() < 0.2,
    )


def call(rng: random.Random, before: list[dict]) -> Example:
    """A question that fits one of the tools on offer."""
    # Whether to add or to call is the hardest choice: a sum can be answered without a tool.
    kind = ADDER if rng.random() < 0.2 else rng.choice(KINDS)
    chosen = offers(rng, kind)
    offer = next(o for o in chosen if o.kind is kind)
    values = kind.values(rng)
    question = user(rng.choice(kind.questions).format(**values))
    return _example(rng, before + [question], offer.call_text(values), chosen, f"I need the tool {offer.name}.")


def _answered(rng: random.Random, offer: Offer) -> tuple[list[dict], str]:
    """A question, its call and the tool's answer; and the sentence that states the answer."""
    kind = offer.kind
    values = kind.values(rng)
    outcome, sentence = kind.result(rng, values)
    text = json.dumps(outcome, separators=(",", ":") if rng.random() < 0.2 else None)
    if len(outcome) == 1 and rng.random() < 0.35:
        text = str(next(iter(outcome.values())))
    arguments = json.dumps(offer.arguments(values), ensure_ascii=False)
    messages = [
        user(rng.choice(kind.questions).format(**values)),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call", "type": "function", "function": {"name": offer.name, "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": "call", "content": text},
    ]
    return messages, sentence


def result(rng: random.Random, before: list[dict]) -> Example:
    """The tool has answered: state its result."""
    kind = rng.choice(KINDS)
    chosen = offers(rng, kind)
    offer = next(o for o in chosen if o.kind is kind)
    messages, sentence = _answered(rng, offer)
    return _example(rng, before + messages, sentence, chosen, "The tool has answered.")


def session(rng: random.Random, before: list[dict]) -> Example:
    """Several questions over the same tools; the last one waits for its call or its sentence."""
    chosen = offers(rng, rng.choice(KINDS))[:2]
    messages = list(before)
    for _ in range(rng.choice([1, 2, 3])):
        exchange, sentence = _answered(rng, rng.choice(chosen))
        messages += exchange + [assistant(sentence)]
    offer = rng.choice(chosen)
    if rng.random() < 0.3:
        exchange, sentence = _answered(rng, offer)
        return _example(rng, messages + exchange, sentence, chosen, "The tool has answered.")
    values = offer.kind.values(rng)
    question = user(rng.choice(offer.kind.questions).format(**values))
    return _example(rng, messages + [question], offer.call_text(values), chosen, f"I need the tool {offer.name}.")


def unfitting(rng: random.Random, before: list[dict]) -> Example:
    """Tools are on offer and none of them fits: answer in words."""
    if rng.random() < 0.55:
        kind = rng.choice([k for k in KINDS if k.refusal])
        values = kind.values(rng)
        question = user(rng.choice(kind.questions).format(**values))
        return _example(rng, before + [question], kind.refusal, offers(rng, None, avoid=kind), "No tool fits.")
    skill = rng.choice([sums.exchange, sums.exchange, stories.exchange, facts.about, facts.talk])
    exchange = skill(rng)
    chosen = offers(rng, None, avoid=ADDER if skill is sums.exchange else None)
    return _example(rng, before + [user(exchange.question)], exchange.answer, chosen, exchange.thought)


def none_offered(rng: random.Random, before: list[dict]) -> Example:
    """A question for a tool, and there is none."""
    kind = rng.choice([k for k in KINDS if k.refusal])
    question = rng.choice(kind.questions).format(**kind.values(rng))
    thought = "No tool fits." if rng.random() < 0.15 else None
    return Example(before + [user(question)], kind.refusal, thought=thought)


def earlier_call(rng: random.Random) -> list[dict]:
    """A finished question about something else, to stand before the real one."""
    exchange = rng.choice([facts.talk, facts.about, sums.exchange])(rng)
    return [user(exchange.question), assistant(exchange.answer)]
