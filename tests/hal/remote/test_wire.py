"""What a child may say, byte by byte, and graphs that cross to it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, InvalidModel, NotSupported
from ai_assistant.hal.contract import Capabilities
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.remote import graphs, shared, wire

_CAPABILITIES = wire.of_capabilities(Capabilities(frozenset(DType)))


def test_frames_come_in_any_pieces() -> None:
    data = wire.frame({"id": 1}) + wire.frame({"id": 2, "x": [1, None]})
    buffer = bytearray()
    found = []
    for byte in data:
        buffer.append(byte)
        while (message := wire.take(buffer)) is not None:
            found.append(message)
    assert found == [{"id": 1}, {"id": 2, "x": [1, None]}]
    assert not buffer


@pytest.mark.parametrize(
    "data",
    [
        bytes(4),
        (wire.MAX_FRAME + 1).to_bytes(4, "little"),
        b"\xff\xff\xff\xff",
        b"\x02\0\0\0[]",
        b"\x04\0\0\0null",
        b"\x03\0\0\0{,}",
        b"\x02\0\0\0\xff\xfe",
        (5000).to_bytes(4, "little") + b"1" * 5000,
        (100000).to_bytes(4, "little") + b'{"a":' * 20000,
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(wire.Garbage):
        wire.take(bytearray(data))


@pytest.mark.parametrize(
    "value", [None, 3, [], ["f33"], ["f32", -1], ["f32", 1.5], ["f32", True], ["f32", "4"], ["f32", 1 << 63], [[]],
              ["f32", 1 << 40, 2], ["f32", *[1] * 65], {"f32": 1}],
)  # fmt: skip
def test_tensors_that_cannot_be(value: object) -> None:
    with pytest.raises(wire.Garbage):
        wire.spec(value)


@pytest.mark.parametrize(
    "change",
    [
        {"alignment": 0}, {"alignment": 3}, {"alignment": 1 << 30}, {"alignment": "64"}, {"dtypes": ["f32", "f8"]},
        {"dtypes": 3}, {"dtypes": [[]]}, {"memory_bytes": -1}, {"memory_bytes": 1.0}, {"max_queues": None},
        {"dynamic_shapes": 1},
    ],
)  # fmt: skip
def test_capabilities_that_cannot_be(change: dict[str, Any]) -> None:
    assert wire.capabilities(_CAPABILITIES).dtypes == set(DType)
    with pytest.raises(wire.Garbage):
        wire.capabilities({**_CAPABILITIES, **change})


@pytest.mark.parametrize(
    "value", [{}, {"devices": 1}, {"devices": [["a", "b"]]}, {"devices": [["a", "b", "c", 4]]},
              {"devices": [], "unavailable": 4, "hint": ""}, {"devices": [["a"] * 4] * 1000}],
)  # fmt: skip
def test_probes_that_cannot_be(value: dict[str, Any]) -> None:
    with pytest.raises(wire.Garbage):
        wire.probe(value)
    with pytest.raises(BackendFailed, match="broke the protocol"):
        wire.checked(lambda: wire.probe(value))


def test_errors_are_of_the_contract_or_none() -> None:
    assert type(wire.error({"name": "NotSupported", "message": "x"})) is NotSupported
    for name in ("InternalError", "NoSuchModel", "AIAssistantError", "os", "Timeout"):
        assert type(wire.error({"name": name, "message": "x"})) is BackendFailed
    for wrong in (3, None, {"name": 1}, {"name": "Busy", "message": []}):
        with pytest.raises(wire.Garbage):
            wire.error(wrong)


def _cross(graph: Graph) -> Graph:
    return graphs.unpack(np.frombuffer(b"".join(bytes(each) for each in graphs.pack(graph)), np.uint8))


def test_a_graph_crosses_whole() -> None:
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    values = (
        Value("x", TensorSpec(DType.F16, (None, 3))), Value("w", TensorSpec(DType.F16, (2, 3)), weight),
        Value("n", TensorSpec(DType.I64), np.array(-3)), Value("?", None), Value("y", TensorSpec(DType.BOOL, (0,))),
    )  # fmt: skip
    node = Node("Clip", 13, (0, NO_VALUE, 2), (3, 4), {"a": 1, "b": 1.0, "c": ("x", "y"), "d": ()}, "com.example", "n1")
    found = _cross(Graph(values, (node,), (0,), (4, 3), {"": 17, "com.example": 2}, "g"))
    assert found.values[0].spec == values[0].spec
    assert found.values[3].spec is None
    assert found.values[1].data is not None
    assert found.values[2].data is not None
    assert np.array_equal(found.values[1].data, weight)
    assert not found.values[1].data.flags.writeable
    assert (found.values[2].data.shape, int(found.values[2].data)) == ((), -3)
    assert found.nodes[0].attributes == {"a": 1, "b": 1.0, "c": ("x", "y"), "d": ()}
    assert isinstance(found.nodes[0].attributes["b"], float)
    assert (found.inputs, found.outputs, found.opsets, found.name) == ((0,), (4, 3), {"": 17, "com.example": 2}, "g")
    assert str(found.nodes[0]) == "com.example.Clip-13"


def test_a_damaged_graph_is_refused() -> None:
    one = TensorSpec(DType.F32, (1,))
    graph = Graph((Value("x", one), Value("y", one)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,))
    good = bytearray(b"".join(bytes(each) for each in graphs.pack(graph)))
    refused = 0
    for place in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        try:
            graphs.unpack(np.frombuffer(bytes(damaged), np.uint8))
        except InvalidModel:
            refused += 1
    assert refused > 50
    for end in range(0, len(good) - 64, 7):
        with pytest.raises(InvalidModel):
            graphs.unpack(np.frombuffer(bytes(good[:end]), np.uint8))


def test_shared_memory_cannot_shrink() -> None:
    descriptor, nbytes = shared.filled(b"abc", np.arange(3, dtype=np.uint8), b"")
    with os.fdopen(descriptor, "r+b") as file:
        assert shared.view(file.fileno(), nbytes).tobytes() == b"abc\0\1\2"
        with pytest.raises(OSError, match="not permitted"):
            file.truncate(1)
        with pytest.raises(OSError, match="not permitted"):
            file.truncate(100)
    for impossible in (1 << 62, 1 << 70):
        with pytest.raises(OSError):  # noqa: PT011 - the system's words differ
            shared.view(shared.create(impossible), impossible)


def test_messages_that_are_too_long_are_not_sent() -> None:
    with pytest.raises(wire.Garbage):
        wire.frame({"x": "y" * wire.MAX_FRAME})
    assert len(json.dumps(wire.of_error(SystemError("x" * 10000)))) < 1000
