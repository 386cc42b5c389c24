"""The backends of the product, in the order in which they are shown. One file each; its name is the backend's."""

from __future__ import annotations

from importlib import import_module

from ai_assistant.errors import NotSupported
from ai_assistant.hal.contract import Backend

BUILT_IN = ("cpu", "onnxruntime", "ggml", "openvino", "null")


def load(name: str) -> Backend:
    """A backend of the product. Whether it has a device here its `probe` tells.

    Raises:
        NotSupported: there is none of that name.
    """
    if name not in BUILT_IN:
        raise NotSupported(f"there is no backend {name[:40]!r}", hint=f"the product has {', '.join(BUILT_IN)}")
    backend: Backend = import_module(f"{__name__}.{name}").BACKEND()
    return backend
