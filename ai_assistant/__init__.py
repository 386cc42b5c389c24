"""The public names of AI Assistant OS; everything else is an implementation detail."""

from __future__ import annotations
