"""Load on an OpenAI-compatible server, as seen by its clients."""

import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import requests


@dataclass
class Stream:
    first_s: float
    tokens: int


def prompt(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(20, 200), k=n)


def timed(url: str, ids: list[int], max_tokens: int) -> float:
    """Seconds of one whole completion."""
    body = {"prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    response = requests.post(f"{url}/v1/completions", json=body, timeout=600)
    seconds = time.perf_counter() - start
    if response.status_code != 200 or response.json()["usage"]["completion_tokens"] != max_tokens:
        raise RuntimeError(f"{response.status_code} {response.text[:300]}")
    return seconds


def speeds(url: str, ids: list[int], max_tokens: int) -> tuple[float, float]:
    """Prefill and decode of one request, in tokens a second: the time of one token, and what more tokens add to it."""
    first = timed(url, ids, 1)
    whole = timed(url, ids, max_tokens)
    return len(ids) / first, (max_tokens - 1) / (whole - first)


def together(url: str, prompts: list[list[int]], max_tokens: int) -> float:
    """Seconds until all of these, sent at once, are answered."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda ids: timed(url, ids, max_tokens), prompts))
    return time.perf_counter() - start


def stream(url: str, text: str, max_tokens: int, extra: dict) -> Stream:
    """One streamed answer; every event with text counts as a token until the usage says better."""
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **extra}
    start, first, tokens = time.perf_counter(), None, 0
    with requests.post(f"{url}/v1/completions", json=body, timeout=1200, stream=True) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.text[:300]}")
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in event["choices"]):
                first = first or time.perf_counter() - start
    return Stream(first or time.perf_counter() - start, tokens)


def streams(url: str, texts: list[str], max_tokens: int, extra: dict) -> tuple[float, float]:
    """Tokens a second of all streams together, and the median time to the first token."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(texts)) as pool:
        done = list(pool.map(lambda text: stream(url, text, max_tokens, extra), texts))
    seconds = time.perf_counter() - start
    return sum(one.tokens for one in done) / seconds, statistics.median(one.first_s for one in done)
