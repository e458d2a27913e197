"""The kinds of tools the model learns to call: their names, arguments, questions and results.

A kind has several names for the function and for every argument. The training text mixes them, so
that the model has to read the schema instead of remembering it.
"""

import random
from dataclasses import dataclass
from typing import Callable

import sums
import words

Values = dict[str, object]


@dataclass(frozen=True)
class Argument:
    """One argument: `key` names its value in the question, `names` are its names in a schema."""

    key: str
    names: tuple[str, ...]
    type: str
    description: str


@dataclass(frozen=True)
class ToolKind:
    names: tuple[str, ...]
    description: str
    arguments: tuple[Argument, ...]
    questions: tuple[str, ...]
    values: Callable[[random.Random], Values]
    # The tool's result, as an object, and the sentence that states it.
    result: Callable[[random.Random, Values], tuple[Values, str]]
    # What is said when the question is asked and no such tool is offered.
    refusal: str


def _weather(rng: random.Random, values: Values) -> tuple[Values, str]:
    degrees = rng.randint(0, 35)
    sky = rng.choice(["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy"])
    key = rng.choice(["temperature", "temperature", "degrees", "temp"])
    other = rng.choice(["condition", "conditions", "weather", "sky"])
    result = {key: degrees, other: sky}
    if rng.random() < 0.3:
        result = {other: sky, key: degrees}
    if rng.random() < 0.3:
        result = {"city": values["city"], **result}
    return result, f"It is {sky} in {values['city']}, with {degrees} degrees."


def _sum(rng: random.Random, values: Values) -> tuple[Values, str]:
    a, b = values["a"], values["b"]
    key = rng.choice(["result", "sum", "value", "answer"])
    return {key: a + b}, sums.answer(a, b)


def _time(rng: random.Random, values: Values) -> tuple[Values, str]:
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    result = {rng.choice(["time", "time", "local_time", "clock"]): clock}
    if rng.random() < 0.3:
        result = {"city": values["city"], **result}
    return result, f"It is {clock} in {values['city']}."


def _done(sentence: str) -> Callable[[random.Random, Values], tuple[Values, str]]:
    def result(rng: random.Random, values: Values) -> tuple[Values, str]:
        answer = rng.choice([{"ok": True}, {"status": "ok"}, {"status": "done"}, {"success": True}])
        return answer, sentence.format(**values)

    return result


def _found(rng: random.Random, values: Values) -> tuple[Values, str]:
    count = rng.randint(2, 99)
    key = rng.choice(["results", "hits", "count", "found"])
    return {key: count}, f"I found {count} results for {values['topic']}."


CITY = Argument("city", ("city", "city", "location", "place", "town"), "string", "Name of the city")

KINDS = (
    ToolKind(
        ("get_weather", "get_weather", "weather", "current_weather", "lookup_weather", "get_current_weather"),
        "Get the current weather in a city",
        (CITY,),
        (
            "What is the weather in {city}?", "What's the weather in {city}?", "How is the weather in {city}?",
            "What is the weather like in {city}?", "Is it raining in {city}?", "Is it sunny in {city} today?",
            "Tell me the weather in {city}.", "Weather in {city}?", "How warm is it in {city}?",
            "What is the weather in {city} today?",
        ),
        lambda rng: {"city": words.city(rng)},
        _weather,
        "I cannot look up the weather, because I have no tool for it.",
    ),
    ToolKind(
        ("add", "add", "add_numbers", "sum", "calculate_sum", "plus"),
        "Add two numbers",
        (
            Argument("a", ("a", "a", "x", "first", "left"), "integer", "The first number"),
            Argument("b", ("b", "b", "y", "second", "right"), "integer", "The second number"),
        ),
        tuple(sums.PHRASINGS),
        lambda rng: dict(zip("ab", sums.pair(rng))),
        _sum,
        "",
    ),
    ToolKind(
        ("get_time", "get_time", "local_time", "clock", "current_time", "get_current_time"),
        "Get the local time in a city",
        (CITY,),
        (
            "What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.",
            "How late is it in {city}?", "What's the local time in {city}?", "Time in {city}?",
            "What time is it in {city} now?",
        ),
        lambda rng: {"city": words.city(rng)},
        _time,
        "I cannot look up the time, because I have no tool for it.",
    ),
    ToolKind(
        ("set_timer", "set_timer", "start_timer", "timer", "create_timer"),
        "Set a timer",
        (Argument("minutes", ("minutes", "minutes", "duration", "duration_minutes", "length"), "integer", "Number of minutes"),),
        (
            "Set a timer for {minutes} minutes.", "Start a timer for {minutes} minutes.", "Please set a timer for {minutes} minutes.",
            "Wake me in {minutes} minutes.", "Can you set a timer for {minutes} minutes?", "Timer, {minutes} minutes.",
            "Set a {minutes} minute timer.",
        ),
        lambda rng: {"minutes": words.minutes(rng)},
        _done("The timer is set for {minutes} minutes."),
        "I cannot set a timer, because I have no tool for it.",
    ),
    ToolKind(
        ("search", "search", "web_search", "find", "search_web"),
        "Search the web",
        (Argument("topic", ("query", "query", "q", "text", "keywords"), "string", "What to search for"),),
        (
            "Search for {topic}.", "Search the web for {topic}.", "Find something about {topic}.",
            "Look up {topic}.", "Can you search for {topic}?", "Please search for {topic}.",
        ),
        lambda rng: {"topic": words.topic(rng)},
        _found,
        "I cannot search, because I have no tool for it.",
    ),
    ToolKind(
        ("send_message", "send_message", "message", "send_text", "write_message"),
        "Send a message to a person",
        (
            Argument("person", ("to", "recipient", "name", "person"), "string", "Who gets the message"),
            Argument("message", ("text", "message", "body", "content"), "string", "What the message says"),
        ),
        (
            "Tell {person} that {message}.", "Send a message to {person}: {message}.", "Write to {person} that {message}.",
            "Let {person} know that {message}.",
        ),
        lambda rng: {"person": words.person(rng), "message": rng.choice(words.MESSAGES)},
        _done("I told {person} that {message}."),
        "I cannot send messages, because I have no tool for it.",
    ),
    ToolKind(
        ("call", "call", "phone", "call_person", "start_call"),
        "Call a person on the phone",
        (Argument("person", ("name", "person", "contact", "who"), "string", "Name of the person"),),
        ("Call {person}.", "Please call {person}.", "Can you call {person}?", "Phone {person}.", "Give {person} a call."),
        lambda rng: {"person": words.person(rng)},
        _done("I am calling {person}."),
        "I cannot call anyone, because I have no tool for it.",
    ),
    ToolKind(
        ("set_light", "set_light", "light", "switch_light", "lights"),
        "Turn the light in a room on or off",
        (
            Argument("room", ("room", "room", "location", "where"), "string", "Name of the room"),
            Argument("on", ("on", "on", "state", "enabled"), "boolean", "True turns it on"),
        ),
        (
            "Turn {word} the light in the {room}.", "Please turn {word} the light in the {room}.", "Light {word} in the {room}.",
            "Switch {word} the {room} light.",
        ),
        lambda rng: rng.choice([{"on": True, "word": "on"}, {"on": False, "word": "off"}]) | {"room": rng.choice(words.ROOMS)},
        _done("The light in the {room} is {word}."),
        "I cannot switch lights, because I have no tool for it.",
    ),
)
