"""Looks into a model file in a process of its own: a hostile header costs neither memory nor time of the daemon.

Run as ``python3 -m ai_assistant.daemon.inspection FD LOAD_OPTIONS``; prints one JSON object: either
``{"info": …, "memory": …}`` or an error as in `AIAssistantError.to_dict`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import weakref
from dataclasses import asdict, dataclass
from typing import Any

from ai_assistant.engines.contract import LoadOptions, ModelInfo
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.errors import AIAssistantError, InvalidModel, Timeout, from_name

TIMEOUT_S = 60.0
_AT_A_TIME = 1
_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
# Well within the daemon's MemoryMax=, which counts this child as well.
_MEMORY_BYTES = 512 << 20
_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file is, and what the memory depends on that loading it takes."""

    info: ModelInfo
    memory: MemoryShape


def inspect_here(fd: int, options: LoadOptions) -> Inspection:
    """Inspect in this process: for files of the image, and in the child.

    Raises:
        InvalidModel: with the reason.
    """
    from ai_assistant.engines.sniff import ModelFormat, sniff

    found = sniff(fd)
    if found is ModelFormat.UNKNOWN and os.fstat(fd).st_size:
        raise InvalidModel("the file is no model: its first bytes are those of no known format")
    if found is ModelFormat.ONNX:
        from ai_assistant.engines import onnx_rules
        from ai_assistant.engines.onnx_package import package_of

        checked = onnx_rules.check(package_of(fd))
        return Inspection(checked.info, checked.memory)
    if found is ModelFormat.SAFETENSORS:
        raise InvalidModel(f"models in the format {found} cannot be used yet", hint="convert it to GGUF")
    from ai_assistant.engines.gguf import read_gguf
    from ai_assistant.engines.gguf_rules import check, memory_shape

    model = read_gguf(fd)
    return Inspection(check(model), memory_shape(model))


async def inspect(fd: int, options: LoadOptions, *, timeout_s: float = TIMEOUT_S) -> Inspection:
    """Inspect in a child process with limits on memory and time; `fd` stays open and unmoved.

    Raises:
        InvalidModel: with the reason.
        Timeout: the file cannot be read in time.
    """
    loop = asyncio.get_running_loop()
    # Each is a process with a core of its own: many callers at once wait here, not the machine.
    async with _slots.setdefault(loop, asyncio.Semaphore(_AT_A_TIME)):
        return await _inspect(fd, options, timeout_s)


async def _inspect(fd: int, options: LoadOptions, timeout_s: float) -> Inspection:
    arguments = [str(fd), json.dumps(asdict(options))]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ai_assistant.daemon.inspection",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=[fd],
    )
    try:
        answer, _ = await asyncio.wait_for(child.communicate(), timeout_s)
    except TimeoutError:
        raise Timeout("the model file cannot be read in time") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        values = json.loads(answer[:_ANSWER_BYTES])
    except ValueError:
        raise InvalidModel("the file's header takes too much memory or time to read") from None
    if "info" not in values:
        raise from_name(values["name"], values["message"], hint=values["hint"] or "", param=values["param"])
    return Inspection(ModelInfo(**values["info"]), MemoryShape.from_dict(values["memory"]))


def main(arguments: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIMEOUT_S), int(TIMEOUT_S)))
    out: dict[str, Any]
    try:
        found = inspect_here(int(arguments[0]), LoadOptions(**json.loads(arguments[1])))
        out = {"info": asdict(found.info), "memory": found.memory.to_dict()}
    except AIAssistantError as error:
        out = {**error.to_dict()}
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
