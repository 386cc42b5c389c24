"""The Python example: right results, reasons for what it cannot do, and a size that can be read in one sitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ai_assistant.hal.examples.vendor_python.backend as example
from ai_assistant.errors import NotSupported
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value


def _graph(axis: int = -1) -> Graph:
    square, weight = TensorSpec(DType.F32, (3, 3)), np.arange(9, dtype=np.float32).reshape(3, 3)
    values = (Value("x", square), Value("w", square, weight), *(Value(name, square) for name in "abcd"))
    return Graph(
        values,
        (
            Node("MatMul", 13, (0, 1), (2,)),
            Node("Add", 14, (2, 1), (3,)),
            Node("Relu", 14, (3,), (4,)),
            Node("Softmax", 13, (4,), (5,), {"axis": axis}),
        ),
        (0,),
        (5,),
    )


def test_it_computes_on_its_queue() -> None:
    x = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    weight = np.arange(9, dtype=np.float32).reshape(3, 3)
    with example.BACKEND().open() as device:
        program = device.compile(_graph())
        given, made = device.allocator.upload(x), device.allocator.tensor(program.outputs[0])
        device.queue().submit(program, [given], [made]).wait(30)
        powers = np.exp(np.maximum(x @ weight + weight, 0).astype(np.float64))
        np.testing.assert_allclose(made.numpy(), powers / powers.sum(-1, keepdims=True), rtol=1e-5)


def test_what_it_cannot_do_is_said_with_the_reason() -> None:
    backend = example.BACKEND()
    with backend.open("0") as device:
        with pytest.raises(NotSupported, match="only the last axis"):
            device.compile(_graph(0))
        erf = Graph(
            (Value("x", TensorSpec(DType.F32, (2,))), Value("y", None)), (Node("Erf", 13, (0,), (1,)),), (0,), (1,)
        )
        assert not device.supports(erf.nodes[0], erf)
        open_size = TensorSpec(DType.F32, (None,))
        relu = Graph((Value("x", open_size), Value("y", open_size)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,))
        assert device.supports(relu.nodes[0], relu).reason == "the device needs fixed shapes"
    with pytest.raises(NotSupported, match="no device"):
        backend.open("7")


def test_it_stays_short() -> None:
    assert len(Path(example.__file__).read_text().splitlines()) <= 150
