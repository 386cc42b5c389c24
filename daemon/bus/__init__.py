"""The D-Bus side of the daemon: its names on the bus, and its interfaces as their XML says."""

from __future__ import annotations

from pathlib import Path

from ai_assistant.services import schema

BUS_NAME = "org.ai_assistant1"
ROOT = "/org/ai_assistant1"
NAMES = ("Manager", "Inference", "Model", "Job", "Device")
TEXTS = frozenset({"Generate", "OpenStream", "Embed", "EmbedWith"})
"""Methods that take texts, and so may be large."""


def load(name: str) -> schema.Interface:
    """The interface ``org.ai_assistant1.<name>`` from its file beside this module."""
    return schema.parse((Path(__file__).parent / "xml" / f"{schema.PREFIX}{name}.xml").read_text("utf-8"))
