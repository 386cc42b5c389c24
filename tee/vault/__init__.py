"""`ai-assistant-vaultd`: a tiny root service, started by the bus on demand. Its names on the bus, and its XML."""

from __future__ import annotations

from importlib import resources

from ai_assistant.services import schema

BUS_NAME = "org.ai_assistant1.Vault"
PATH = "/org/ai_assistant1/vault"
INTERFACE = "org.ai_assistant1.Vault"


def load() -> schema.Interface:
    """The interface from its file beside this module."""
    return schema.parse((resources.files(__package__) / f"{INTERFACE}.xml").read_text("utf-8"))
