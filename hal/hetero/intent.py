"""What somebody wants of several devices: `HETERO_COMPUTE`, and the same as an option of a request.

OFF                 one device runs the whole graph: the one predicted to be fastest (the default)
ON                  as latency
latency             one request as soon as possible
performance         as many requests per second as possible, several at a time
efficiency          as few joules as possible
cpu,onnxruntime     these devices only, for latency; BACKEND or BACKEND:DEVICE, in order of preference
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ai_assistant.errors import InvalidArgument

VARIABLE = "HETERO_COMPUTE"
MAX_LENGTH = 1000
MAX_DEVICES = 16
_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9][A-Za-z0-9_.:@-]{0,127})?", re.ASCII)
_HINT = "one of ON, OFF, performance, efficiency, latency, or devices such as cpu,onnxruntime"


class Objective(StrEnum):
    """What a plan is to be best at."""

    LATENCY = "latency"
    PERFORMANCE = "performance"
    EFFICIENCY = "efficiency"


@dataclass(frozen=True, slots=True)
class Intent:
    """A wish that was understood.

    Args:
        mixed: several devices may share one graph.
        devices: names of the only ones that may be used; empty: all that there are.
    """

    mixed: bool = False
    objective: Objective = Objective.LATENCY
    devices: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What `parse` understands as the same."""
        if self.devices:
            return ",".join(self.devices)
        return str(self.objective) if self.mixed else "OFF"


OFF = Intent()
_WORDS = {"on": Intent(mixed=True), "off": OFF} | {str(each): Intent(True, each) for each in Objective}


def parse(text: str) -> Intent:
    """Understand a wish; capitals make no difference in words, and do in names of devices.

    Raises:
        InvalidArgument: it is none: what is wrong with it, with `param` "hetero_compute".
    """
    if not isinstance(text, str):
        raise _wrong(f"a text is expected, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise _wrong(f"{len(text)} characters are too many")
    word = text.strip()
    if not word:
        raise _wrong("it is empty")
    if (known := _WORDS.get(word.lower())) is not None:
        return known
    devices = tuple(each.strip() for each in word.split(","))
    for each in devices:
        if each.lower() in _WORDS:
            raise _wrong(f"{each} stands alone, and not in a list of devices")
        if not _DEVICE.fullmatch(each):
            raise _wrong(f"{each[:60]!r} is no name of a device")
    if len(set(devices)) != len(devices):
        raise _wrong("a device is named twice")
    if len(devices) > MAX_DEVICES:
        raise _wrong(f"{len(devices)} devices are more than {MAX_DEVICES}")
    return Intent(mixed=len(devices) > 1, devices=devices)


def from_environment(environment: Mapping[str, str] | None = None, default: Intent = OFF) -> Intent:
    """The wish in `HETERO_COMPUTE`; the default where it is not set, or set to nothing.

    Raises:
        InvalidArgument: as `parse`.
    """
    found = (os.environ if environment is None else environment).get(VARIABLE, "")
    return parse(found) if found else default


def _wrong(what: str) -> InvalidArgument:
    return InvalidArgument(f"{VARIABLE} is not understood: {what}", hint=_HINT, param=VARIABLE.lower())
