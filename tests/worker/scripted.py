"""A worker process whose engine does what the prompt says; no native library is needed.

`python -m tests.worker.scripted FD [STALL_S]`
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from ai_assistant.daemon.worker.__main__ import _leave
from ai_assistant.daemon.worker.server import WorkerServer
from ai_assistant.engines.contract import (
    Chunk,
    Engine,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    Placement,
    Usage,
)
from ai_assistant.errors import Cancelled, InternalError, InvalidArgument

_INFO = ModelInfo(
    format="gguf", architecture="llama", parameters=1, size_bytes=2, quantization="F32", context_length=3,
    has_chat_template=True, can_embed=True,
)  # fmt: skip


class ScriptedEngine:
    info = _INFO

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.steps = 0
        self.broken = False

    def generate(self, request: GenerateRequest) -> _Scripted:
        if request.prompt == "break":
            self.broken = True
            raise InternalError("the engine failed")
        return _Scripted(self, request.prompt or "")

    def embed(self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None) -> tuple[list[list[float]], int]:
        if not texts:
            raise InvalidArgument("give at least one text")
        if texts[0] == "slow":
            while cancelled is None or not cancelled():
                self.steps += 1
                time.sleep(0.01)
            raise Cancelled("the embedding was cancelled")
        return [[1.0] for _ in texts], len(texts)

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The content of a file that came with the model when asked for no tokens."""
        return bytes(tokens).decode() if tokens else repr(dict(self.files))

    def rerank(
        self, query: str, documents: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[float], int]:
        return [math.nan if each == "nan" else float(each == query) for each in documents], len(documents)

    def classify(
        self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        count = int(texts[0]) if texts[0].isdecimal() else 1
        return [[(f"label {k}", 1 / count) for k in range(count)] for _ in texts], len(texts)

    def stats(self) -> EngineStats:
        return EngineStats(running=1, decode_tokens_per_s=math.nan, prefill_tokens_per_s=math.inf)

    def trim(self) -> int:
        return 4096

    def close(self) -> None: ...


class _Scripted:
    def __init__(self, engine: ScriptedEngine, prompt: str) -> None:
        self._engine = engine
        self._cancelled = threading.Event()
        self._events = self._run(prompt)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(self, prompt: str) -> Iterator[Event]:
        yield Chunk("begun")
        if prompt == "hold the lock":
            re.fullmatch(r"(a|aa)*b", "a" * 200)
        elif prompt == "do nothing":
            self._cancelled.wait()
        elif prompt.startswith("work "):
            for _ in range(int(prompt[5:])):
                time.sleep(0.05)
                self._engine.steps += 1
        if self._cancelled.is_set():
            raise Cancelled("the generation was cancelled")
        yield Finished(FinishReason.STOP, Usage(0, 0))


def _open(_fd: int, options: LoadOptions, _progress: Callable[[float], None], files: Mapping[str, int]) -> Engine:
    if "dies_with" in options.extra:
        options.extra["placing"](Placement(((str(options.extra["dies_with"]), 1),), {"cpu": 5}, 5))
        os.kill(os.getpid(), signal.SIGKILL)
    return cast(Engine, ScriptedEngine({name: os.pread(fd, 64, 0) for name, fd in files.items()}))


if __name__ == "__main__":
    stall_s = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    WorkerServer(socket.socket(fileno=int(sys.argv[1])), _open, stall_s=stall_s).serve()
    _leave(0)
