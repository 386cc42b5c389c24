"""Backends in processes of their own: what a vendor's library does there, it does to itself."""

from ai_assistant.hal.remote.backend import RemoteBackend
from ai_assistant.hal.remote.process import Limits

__all__ = ["Limits", "RemoteBackend"]
