"""Renders conversations with the model's own chat template, as a server would."""

import json
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()


def _environment(separators: tuple[str, str]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False, separators=separators)
    return environment


_SPACED = _environment((", ", ": ")).from_string(TEMPLATE)
_COMPACT = _environment((",", ":")).from_string(TEMPLATE)


def prompt(messages: list[dict], tools: list[dict], thinking: bool, compact: bool = False) -> str:
    """The text that the model continues."""
    template = _COMPACT if compact else _SPACED
    return template.render(messages=messages, tools=tools or None, add_generation_prompt=True, enable_thinking=thinking)
