"""Vulkan as ggml uses it: which drivers it loads, and that f32 stays f32.

A process that loads all of Mesa's drivers pays 20 ms and 60 MB, whether or not the machine has a GPU; and one of them,
lavapipe, is the processor once more, which ggml uses better by itself. Both the loader and ggml read variables of the
environment and nothing else, so they are set for as long as it takes. What somebody has set stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NODES = ("dev/dri/renderD*", "dev/nvidiactl")
"""What a driver opens; NVIDIA's own does without the first."""
CHOSEN = ("VK_LOADER_DRIVERS_DISABLE", "VK_LOADER_DRIVERS_SELECT", "VK_DRIVER_FILES", "VK_ICD_FILENAMES",
          "GGML_VK_VISIBLE_DEVICES")  # fmt: skip
"""Whoever sets one of these has decided which drivers there are."""


def reachable(root: Path = Path("/")) -> bool:
    """Whether this process may open a GPU."""
    return any(os.access(node, os.R_OK | os.W_OK) for pattern in NODES for node in root.glob(pattern))


@contextmanager
def drivers(root: Path = Path("/")) -> Iterator[None]:
    """Around the loading of ggml's plug-ins: no driver without a GPU, and never lavapipe.

    Without any driver ggml has no Vulkan, and says nothing about it.
    """
    wanted = {} if any(name in os.environ for name in CHOSEN) else {CHOSEN[0]: "*lvp*" if reachable(root) else "*"}
    with _environment(wanted):
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Around the first use of a device: its shaders multiply matrices of f32 as f32.

    By default they round both to f16, to three digits, which is right for a language model and not for what says f32.
    A process that has used the device before keeps what it was.
    """
    with _environment({"GGML_VK_DISABLE_F16": "1"}):
        yield


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    mine = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
