"""The official `openai` client against a cluster of two workers with the bundled model: what its users do works as they know it.

    python tests/clients/openai_client.py

Ends with `N passed, N failed`.
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
from cluster import Coordinator, Workers
from report import Report

MODEL = Path(__file__).parents[2] / "demo/model"
SUM = [{"role": "user", "content": "What is 27 + 46?"}]
STORY = [{"role": "user", "content": "Tell me a short story about a fox."}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Get the current weather in a city",
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


class Client:
    def __init__(self, url: str):
        self.api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.model = self.api.models.list().data[0].id

    def chat(self, messages, **options):
        return self.api.chat.completions.create(model=self.model, messages=messages, **{"temperature": 0, "max_tokens": 60, **options})

    def complete(self, prompt, **options):
        return self.api.completions.create(model=self.model, prompt=prompt, **{"temperature": 0, "max_tokens": 20, **options})


def models(client: Client):
    names = [model.id for model in client.api.models.list()]
    assert names == [client.model], names
    assert client.api.models.retrieve(client.model).object == "model"


def chat(client: Client):
    answer = client.chat(SUM)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and choice.message.role == "assistant", choice
    assert "73" in choice.message.content, choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def stream(client: Client):
    whole = client.chat(SUM)
    chunks = list(client.chat(SUM, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, text
    assert chunks[-1].usage == whole.usage, chunks[-1]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def stream_closed_early(client: Client):
    with client.chat(STORY, stream=True, max_tokens=400) as events:
        next(iter(events))
    chat(client)


def logprobs(client: Client):
    choice = client.chat(SUM, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(bytes(token.bytes).decode() for token in content if token.bytes).strip() == choice.message.content.strip()
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0, token
        assert token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs)
        assert math.isclose(token.logprob, token.top_logprobs[0].logprob, abs_tol=1e-4), "greedy takes the most likely token"


def completion_logprobs(client: Client):
    answer = client.complete("Once upon a time", logprobs=2, echo=True)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("Once upon a time")
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == answer.usage.total_tokens
    assert found.token_logprobs[0] is None and all(logprob <= 0 for logprob in found.token_logprobs[1:])
    assert "".join(found.tokens) == answer.choices[0].text


def stop(client: Client):
    whole = client.chat(STORY).choices[0].message.content
    word = whole.split()[3]
    choice = client.chat(STORY, stop=[word]).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == whole[: whole.index(word)], choice
    streamed = client.chat(STORY, stop=word, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == choice.message.content


def length(client: Client):
    answer = client.chat(STORY, max_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5, answer
    answer = client.chat(STORY, max_tokens=openai.omit, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4, answer.usage


def several_prompts(client: Client):
    answer = client.complete(["Once upon", "mlx-cluster is", "2 + 2 ="])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices][1] == client.complete("mlx-cluster is").choices[0].text
    ids = client.complete([[65, 66, 67], [68]], max_tokens=3)
    assert len(ids.choices) == 2 and ids.usage.prompt_tokens == 4, ids


def seed(client: Client):
    settings = {"temperature": 1.0, "max_tokens": 40}
    first, again, other = (client.chat(STORY, seed=seed, **settings).choices[0].message.content for seed in (1, 1, 2))
    assert first == again and first != other


def tools(client: Client):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = client.chat(question, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "get_weather" and "Paris" in call.function.arguments, call
    result = [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
    assert client.chat(question + result, tools=[WEATHER]).choices[0].message.content


def tools_streamed(client: Client):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    deltas = [chunk.choices[0].delta for chunk in client.chat(question, tools=[WEATHER], stream=True) if chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert calls and calls[0].id and calls[0].function.name == "get_weather", deltas
    assert "Paris" in "".join(call.function.arguments or "" for call in calls)


def many_at_once(client: Client):
    questions = [(a, b) for a in (11, 23, 35, 47) for b in (12, 24, 36, 48)]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda pair: client.chat([{"role": "user", "content": f"What is {pair[0]} + {pair[1]}?"}]), questions)
        texts = [answer.choices[0].message.content for answer in answers]
    alone = [client.chat([{"role": "user", "content": f"What is {a} + {b}?"}]).choices[0].message.content for a, b in questions]
    assert texts == alone


def refused(client: Client):
    def refuses(kind, names: str, ask):
        try:
            ask()
        except kind as error:
            assert names in str(error), f"{error} does not name {names}"
            assert isinstance(error.body, dict) and error.body.get("message") and error.body.get("type"), error.body
        else:
            raise AssertionError(f"{names} was accepted")

    bad, chat = openai.BadRequestError, client.chat
    refuses(openai.NotFoundError, "nonsense", lambda: client.api.chat.completions.create(model="nonsense", messages=SUM))
    refuses(bad, "temperature", lambda: chat(SUM, temperature=-1))
    refuses(bad, "top_p", lambda: chat(SUM, top_p=1.5))
    refuses(bad, "messages", lambda: chat([]))
    refuses(bad, "prompt", lambda: client.complete(""))
    refuses(bad, "prompt", lambda: client.complete([[1_000_000]]))
    refuses(bad, "context", lambda: client.complete([[65] * 100_000]))
    refuses(bad, "frobnicate", lambda: chat(SUM, extra_body={"frobnicate": 1}))
    refuses(bad, "max_tokens", lambda: chat(SUM, max_tokens="five"))
    chat(SUM)


CHECKS = [models, chat, stream, stream_closed_early, logprobs, completion_logprobs, stop, length, several_prompts, seed, tools, tools_streamed,
          many_at_once, refused]


def main() -> None:
    report = Report()
    with Workers(2) as workers, Coordinator(workers, MODEL) as coordinator:
        client = Client(coordinator.url)
        for check in CHECKS:
            report.check(check.__name__.replace("_", " "), check, client)
    report.close()


if __name__ == "__main__":
    main()
