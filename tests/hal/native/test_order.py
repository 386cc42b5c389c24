"""In which order the library's things are given back when Python collects them all at once: a context goes last."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.hal.native import NativeBackend
from ai_assistant.hal.native.library import Library
from tests.hal.native.test_runtime import SPEC, add_one

pytestmark = pytest.mark.engine
X = np.ones(4, np.float32)
GIVING_BACK = ("close", "free", "program_free", "queue_destroy", "event_destroy")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the functions that give something back, in the order in which they were called."""
    called: list[str] = []
    function = Library.function

    def noted(library: Library, name: str) -> Callable[..., Any]:
        found = function(library, name)

        def call(*arguments: Any) -> Any:
            called.append(name)
            return found(*arguments)

        return call if name in GIVING_BACK else found

    monkeypatch.setattr(Library, "function", noted)
    gc.collect()
    gc.disable()
    yield called
    gc.enable()


def wait(event: threading.Event) -> None:
    event.wait(30)


@pytest.mark.parametrize("work", [False, True])
def test_of_garbage_that_refers_to_itself_the_context_goes_last(
    example_library: Path, ended: list[str], work: bool
) -> None:
    device = NativeBackend(example_library).open()
    tensor, output = device.allocator.upload(X), device.allocator.tensor(SPEC)
    program, queue = device.compile(add_one()), device.queue()
    go_on = threading.Event()
    # Work waits in the queue and uses the memory: then the queue has to end before the memory goes.
    first = queue.callback(lambda: wait(go_on))
    event = queue.submit(program, [tensor], [output])
    if work:
        threading.Timer(0.3, go_on.set).start()
    else:
        go_on.set()
        event.wait(30)
        queue.synchronize(30)
    circle: list[Any] = [device, tensor, output, program, queue, first, event]
    circle.append(circle)
    ended.clear()
    del circle, device, tensor, output, program, queue, first, event
    assert ended == []
    gc.collect()
    assert ended.count("close") == 1
    assert ended[-1] == "close"
    assert (ended.count("free"), ended.count("event_destroy"), ended.count("queue_destroy")) == (2, 2, 1)
    if work:
        assert ended.index("queue_destroy") < ended.index("free")
