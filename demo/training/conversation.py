"""The shape of one training example, shared by all skills."""

from dataclasses import dataclass, field


@dataclass
class Example:
    """A conversation that ends where the assistant has to speak, and what it then says.

    `messages` are OpenAI messages. `thought` is None where thinking is off; otherwise it is
    what stands between the think tags. `compact` writes the JSON of the tools without spaces,
    as some template engines do.
    """

    messages: list[dict]
    answer: str
    tools: list[dict] = field(default_factory=list)
    thought: str | None = None
    compact: bool = False


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


@dataclass
class Exchange:
    """One question with its answer, from which whole conversations are built."""

    question: str
    answer: str
    thought: str
