"""The committed model and what it was made from cannot drift apart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.actions.catalogue import ACTIONS, fingerprint
from ai_assistant.engines.gguf import Gguf, read_gguf
from ai_assistant.engines.templates import ChatTemplate

FILE = Path(__file__).parents[2] / "models" / "assistant-1.gguf"


@pytest.fixture(scope="module")
def header() -> Gguf:
    fd = os.open(FILE, os.O_RDONLY)
    try:
        return read_gguf(fd)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.with_suffix(".json").read_text("utf-8"))
    return loaded


def test_the_file_is_the_described_one(facts: dict[str, Any]) -> None:
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == facts["sha256"]
    assert len(content) == facts["size_bytes"] <= 10_000_000
    assert (facts["name"], facts["version"], facts["license"]) == ("assistant:1", "1", "Apache-2.0")
    assert isinstance(facts["created"], int)


def test_the_model_knows_exactly_the_actions_of_the_catalogue(header: Gguf, facts: dict[str, Any]) -> None:
    assert header.metadata["ai_assistant.actions_sha256"] == fingerprint() == facts["actions_sha256"], (
        "the catalogue changed: train the model again with `make model`"
    )
    assert header.metadata["ai_assistant.actions"].count == len(ACTIONS) + 1


def test_widths_allow_k_quants(header: Gguf) -> None:
    matrices = [each for each in header.tensors.values() if len(each.shape) == 2]
    assert matrices
    assert all(each.shape[0] % 256 == 0 for each in matrices)
    assert 2e6 <= header.parameters <= 5e6


def test_the_template_renders_every_role_and_leaves_tool_definitions_out(header: Gguf) -> None:
    template = ChatTemplate(header.chat_template)
    tool = {"name": "reboot", "description": "restart", "parameters": {}}
    call = {"id": "1", "type": "function", "function": {"name": "disk", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]  # fmt: skip
    assert template.render(messages, [tool]) == (
        "<|system|>s<|end|><|user|>u<|end|>"
        '<|assistant|>{"name": "disk", "arguments": {}}<|end|><|tool|>t<|end|><|user|>again<|end|><|assistant|>'
    )
