"""The null backend: checks as a device would, and never computes."""

from __future__ import annotations

import numpy as np
import pytest

from ai_assistant.errors import InvalidArgument, NotSupported
from ai_assistant.hal import backends
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value

_PAIR = TensorSpec(DType.F32, (2,))


def _graph(spec: TensorSpec = _PAIR) -> Graph:
    return Graph((Value("x", spec), Value("y", spec)), (Node("Anything", 1, (0,), (1,)),), (0,), (1,))


def test_it_checks_and_answers_with_zeros() -> None:
    backend = backends.load("null")
    assert "no hardware" in backend.probe().devices[0].name
    with backend.open() as device:
        program, queue = device.compile(_graph()), device.queue()
        x = device.allocator.upload(np.array([1, 2], np.float32))
        queue.submit(program, [x], [x]).wait(10)
        assert device.allocator.download(x).tolist() == [0, 0]
        with pytest.raises(InvalidArgument):
            queue.submit(program, [x], [])
        with pytest.raises(NotSupported, match="is not fixed"):
            device.compile(_graph(TensorSpec(DType.F32, (None,))))
        with pytest.raises(NotSupported):
            program.blob()


def test_a_name_that_is_none_of_the_products() -> None:
    with pytest.raises(NotSupported, match="there is no backend 'cuda'"):
        backends.load("cuda")
