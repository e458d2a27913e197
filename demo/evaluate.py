"""Asks a running server about things that the demo model has never seen: `python demo/evaluate.py --url http://127.0.0.1:8080`.

Works with any server that speaks OpenAI's `/v1/chat/completions`. Needs the standard library only. Exits
with 1 when fewer than 95 % of the sums or of the tool calls are right.
"""

import argparse
import json
import random
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Callable

import held_out

REQUIRED_PERCENT = 95.0

SUM_QUESTIONS = [
    "What is {a} + {b}?", "What is {a} plus {b}?", "How much is {a} + {b}?", "Add {a} and {b}.",
    "Calculate {a} + {b}.", "What is the sum of {a} and {b}?", "{a} + {b} = ?", "Can you add {a} and {b}?",
]
STORY_QUESTIONS = [
    "Tell me a story about a {hero}.", "Tell me a short story about a {hero}.", "Write a story about a {hero}.",
    "Can you tell me a story about a {hero}?",
]
# None of these stands in the training text like this.
WHAT_QUESTIONS = [
    "Could you tell me what mlx-cluster is?", "Please tell me about mlx-cluster.", "So what is mlx-cluster?",
    "What exactly is mlx-cluster?", "Explain mlx-cluster to me.", "Please explain mlx-cluster.",
    "What is mlx-cluster about?", "Can you describe mlx-cluster?", "I want to know what mlx-cluster is.",
    "Hello! What is mlx-cluster?", "Tell me what mlx-cluster does.", "What is mlx-cluster, please?",
]


@dataclass
class Tool:
    name: str
    description: str
    # Argument name -> JSON type.
    arguments: dict[str, str]
    questions: list[str] = field(default_factory=list)

    def schema(self) -> dict:
        properties = {name: {"type": kind} for name, kind in self.arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


ASKED_TOOLS = [
    Tool("get_weather", "Get the current weather in a city", {"city": "string"}, [
        "What is the weather in {city}?", "How is the weather in {city}?", "Is it raining in {city}?", "Tell me the weather in {city}.",
    ]),
    Tool("weather", "Get the current weather in a city", {"location": "string"}, [
        "What's the weather in {location}?", "What is the weather like in {location}?", "How warm is it in {location}?",
    ]),
    Tool("get_time", "Get the local time in a city", {"city": "string"}, [
        "What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.",
    ]),
    Tool("add", "Add two numbers", {"a": "integer", "b": "integer"}, [
        "What is {a} + {b}?", "How much is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?",
    ]),
    Tool("add_numbers", "Add two numbers", {"x": "number", "y": "number"}, ["What is {x} + {y}?", "Please add {x} and {y}."]),
    Tool("set_timer", "Set a timer", {"minutes": "integer"}, [
        "Set a timer for {minutes} minutes.", "Start a timer for {minutes} minutes.", "Wake me in {minutes} minutes.",
    ]),
    Tool("call", "Call a person on the phone", {"name": "string"}, ["Call {name}.", "Please call {name}.", "Can you call {name}?"]),
]
OTHER_TOOLS = [
    Tool("search", "Search the web", {"query": "string"}),
    Tool("set_light", "Turn the light in a room on or off", {"room": "string", "on": "boolean"}),
    Tool("send_message", "Send a message to a person", {"to": "string", "text": "string"}),
]


@dataclass
class Reply:
    text: str
    thought: str
    calls: list[dict]
    finish_reason: str


@dataclass
class Question:
    messages: list[dict]
    tools: list[dict]
    # Name of a figure -> whether this reply counts for it.
    judges: dict[str, Callable[[Reply], bool]]
    thinking: bool = False


class Server:
    def __init__(self, url: str, model: str | None, timeout_s: float):
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.model = model or self._request("/v1/models")["data"][0]["id"]

    def _request(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            return json.load(response)

    def ask(self, question: Question) -> Reply:
        body = {
            "model": self.model,
            "messages": question.messages,
            "temperature": 0,
            "max_tokens": 200,
            "chat_template_kwargs": {"enable_thinking": question.thinking},
        }
        if question.tools:
            body["tools"] = question.tools
        choice = self._request("/v1/chat/completions", body)["choices"][0]
        message = choice["message"]
        return Reply(
            text=message.get("content") or "",
            thought=message.get("reasoning_content") or message.get("reasoning") or "",
            calls=[call["function"] for call in message.get("tool_calls") or []],
            finish_reason=choice["finish_reason"],
        )


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def says_sum(reply: Reply, a: int, b: int) -> bool:
    return re.findall(r"\d+", reply.text)[-1:] == [str(a + b)] and reply.finish_reason == "stop"


def call_arguments(reply: Reply) -> dict | None:
    """The arguments of the one call, where they are JSON."""
    if len(reply.calls) != 1:
        return None
    try:
        arguments = json.loads(reply.calls[0]["arguments"])
    except (json.JSONDecodeError, TypeError):
        return None
    return arguments if isinstance(arguments, dict) else None


def well_formed(reply: Reply, tool: Tool) -> bool:
    """The right tool, every argument there and of its type, nothing else, and the right finish reason."""
    arguments = call_arguments(reply)
    if arguments is None or reply.calls[0]["name"] != tool.name or set(arguments) != set(tool.arguments):
        return False
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    right_types = all(isinstance(arguments[name], types[kind]) for name, kind in tool.arguments.items())
    return right_types and reply.finish_reason == "tool_calls"


def offered(rng: random.Random, tool: Tool | None) -> list[dict]:
    """The tool among up to two others that do something else."""
    others = rng.sample(OTHER_TOOLS, rng.choice([0, 1, 2]) if tool else rng.choice([1, 2]))
    chosen = others + ([tool] if tool else [])
    rng.shuffle(chosen)
    return [t.schema() for t in chosen]


def sums(rng: random.Random, count: int) -> list[Question]:
    questions = []
    for number, (a, b) in enumerate(rng.sample(held_out.held_out_pairs(), count + count // 4)):
        content = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        right = lambda reply, a=a, b=b: says_sum(reply, a, b)
        if number < count:
            questions.append(Question(user(content), [], {"sums right": right}))
        else:
            thought = lambda reply, right=right: right(reply) and bool(reply.thought.strip()) and "think>" not in reply.text
            questions.append(Question(user(content), [], {"sums right, thinking first": thought}, thinking=True))
    return questions


def tool_calls(rng: random.Random, count: int) -> list[Question]:
    questions = []
    for _ in range(count):
        tool = rng.choice(ASKED_TOOLS)
        a, b = rng.choice(held_out.held_out_pairs())
        city = rng.choice(held_out.CITIES)
        known = {
            "city": city, "location": city, "a": a, "b": b, "x": a, "y": b,
            "minutes": rng.choice(held_out.MINUTES), "name": rng.choice(held_out.PEOPLE),
        }
        values = {name: known[name] for name in tool.arguments}
        questions.append(Question(user(rng.choice(tool.questions).format(**values)), offered(rng, tool), {
            "tool calls well formed": lambda reply, tool=tool: well_formed(reply, tool),
            "tool calls with exactly the values asked for": lambda reply, tool=tool, values=values: well_formed(reply, tool)
            and call_arguments(reply) == values,
        }))
    return questions


def tool_results(rng: random.Random, count: int) -> list[Question]:
    """The tool has answered; the reply has to state what it said."""
    questions = []
    for _ in range(count):
        city, degrees = rng.choice(held_out.CITIES), rng.randint(0, 35)
        call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}
        messages = user(f"What is the weather in {city}?") + [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"temperature": degrees, "condition": "cloudy"})},
        ]
        states = lambda reply, city=city, degrees=degrees: (
            not reply.calls and city in reply.text and "cloudy" in reply.text and str(degrees) in re.findall(r"\d+", reply.text)
        )
        questions.append(Question(messages, offered(rng, ASKED_TOOLS[0]), {"tool results stated": states}))
    return questions


def no_calls(rng: random.Random, count: int) -> list[Question]:
    """No tool on offer fits, or there is none."""
    in_words = lambda reply: not reply.calls and "tool_call" not in reply.text and bool(reply.text.strip())
    questions = []
    for number in range(count):
        city = rng.choice(held_out.CITIES)
        content = rng.choice([f"What is the weather in {city}?", f"What time is it in {city}?", "Tell me a story about a fox.", "Hello!"])
        tools = offered(rng, None) if number % 2 else []
        questions.append(Question(user(content), tools, {"no call where no tool fits": in_words}))
    return questions


def stories(rng: random.Random, count: int) -> list[Question]:
    questions = []
    for number in range(count):
        hero = held_out.SUBJECTS[number % len(held_out.SUBJECTS)]
        questions.append(Question(user(rng.choice(STORY_QUESTIONS).format(hero=hero)), [], {
            "stories that end by themselves": lambda reply: reply.finish_reason == "stop" and len(reply.text.split()) >= 25,
            "stories about what was asked": lambda reply, hero=hero: hero in reply.text,
        }))
    return questions


def what_it_is() -> list[Question]:
    says = lambda reply: "mlx-cluster" in reply.text and "one machine" in reply.text and reply.finish_reason == "stop"
    return [Question(user(content), [], {"says what it is": says}) for content in WHAT_QUESTIONS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", help="as the server names it; the first it lists when absent")
    parser.add_argument("--count", type=int, default=200, help="sums and tool calls to ask for")
    parser.add_argument("--threads", type=int, default=8, help="requests at once")
    parser.add_argument("--timeout-s", type=float, default=120)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--wrong", action="store_true", help="print the replies that were not right")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    few = max(args.count // 5, 1)
    questions = sums(rng, args.count) + tool_calls(rng, args.count) + tool_results(rng, few)
    questions += no_calls(rng, few) + stories(rng, few) + what_it_is()
    try:
        server = Server(args.url, args.model, args.timeout_s)
        with ThreadPoolExecutor(args.threads) as pool:
            replies = list(pool.map(server.ask, questions))
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
        detail = error.read().decode(errors="replace")[:500] if isinstance(error, urllib.error.HTTPError) else ""
        print(f"{args.url} does not answer as an OpenAI-compatible server: {error} {detail}", file=sys.stderr)
        return 2

    right: dict[str, list[bool]] = {}
    for question, reply in zip(questions, replies):
        for name, judge in question.judges.items():
            right.setdefault(name, []).append(judge(reply))
            if args.wrong and not right[name][-1]:
                print(f"  not right ({name}): {question.messages[-1]['content']} -> {reply}")
    percent = {name: 100 * sum(found) / len(found) for name, found in right.items()}
    for name, found in right.items():
        print(f"{name}: {percent[name]:.1f} % ({sum(found)} of {len(found)})")
    passed = all(percent[name] >= REQUIRED_PERCENT for name in ("sums right", "tool calls well formed"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
