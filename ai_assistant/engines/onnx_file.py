"""Reads what must be known of an ONNX file before native code sees it: inputs, outputs, operators, weights.

ONNX is protocol buffers. This walks the wire format with bounded reads, steps over the weights, and builds nothing
but short lists, so that neither a sparse file of 100 GB nor one that claims 2⁶³ dimensions costs anything. What is
refused here could otherwise read other files (external data), run code of somebody's own (custom operators) or never
end (loops). Source of the fields' numbers: onnx.proto of ONNX 1.17.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ai_assistant.engines.onnx_package import Member, pread
from ai_assistant.errors import InvalidModel, NotSupported

MAX_MODEL_BYTES = (1 << 31) - 1
"""What protocol buffers can hold."""
MAX_NODES = 100_000
MAX_TENSORS = 50_000
MAX_FIELDS = 5_000_000
MAX_VALUES = 64
"""Inputs, and outputs."""
MAX_IR_VERSION = 10
MAX_OPSET = 22
"""Of ONNX Runtime 1.21."""
_MAX_DEPTH = 8
_MAX_TEXT = 4096
_MAX_DIMENSIONS = 8
_WINDOW = 1 << 16
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_NEVER_ENDING = ("Loop", "Scan")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
TYPE_NAMES = {
    1: "F32",
    2: "UINT8",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    10: "F16",
    11: "F64",
    16: "BF16",
    21: "UINT4",
    22: "INT4",
}


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output: its element type, and its shape with None for what is not fixed."""

    name: str
    type: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor; `spans` are the places of its bytes in the file, none for what is stored as varints."""

    name: str
    type: int
    shape: tuple[int, ...]
    elements: int
    spans: tuple[tuple[int, int], ...]
    """(offset from the start of the file, size in bytes)"""


@dataclass(slots=True)
class OnnxFile:
    """The checked outline of one file."""

    size_bytes: int
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)

    @property
    def parameters(self) -> int:
        return sum(each.elements for each in self.weights.values() if len(each.shape) > 0)

    @property
    def quantization(self) -> str:
        """The type that holds most of the weights."""
        sizes: Counter[int] = Counter()
        for each in self.weights.values():
            sizes[each.type] += each.elements * _BITS.get(each.type, 0)
        return TYPE_NAMES.get(max(sizes, key=lambda kind: sizes[kind]), "unknown") if sizes else "unknown"


def read_onnx(member: Member) -> OnnxFile:
    """Raises InvalidModel, or NotSupported for what is sound but not run here; both name the reason."""
    if member.size > MAX_MODEL_BYTES:
        raise InvalidModel(f"model.onnx has {member.size} bytes, more than an ONNX file can have")
    return _Reader(member).model()


class _Reader:
    def __init__(self, member: Member) -> None:
        self._member = member
        self._at = -1
        self._window = b""
        self._nodes = self._steps = 0
        self._file = OnnxFile(member.size)

    # ---- the wire format

    def _bytes(self, start: int, size: int) -> bytes:
        if self._at < 0 or start < self._at or start + size > self._at + len(self._window):
            room = min(max(size, _WINDOW), self._member.size - start)
            self._window = pread(self._member.fd, room, self._member.offset + start)
            self._at = start
        return self._window[start - self._at : start - self._at + size]

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        data = self._bytes(at, min(10, end - at))
        value = 0
        for index, byte in enumerate(data):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value & (1 << 64) - 1, at + index + 1
        raise InvalidModel(f"the ONNX file is damaged at byte {at}")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, value or offset, end) of a message."""
        at = start
        while at < end:
            self._steps += 1
            if self._steps > MAX_FIELDS:
                raise InvalidModel(f"the ONNX file has more than {MAX_FIELDS} fields")
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
                yield number, kind, value, at
                continue
            if kind == _BYTES:
                size, at = self._varint(at, end)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
            else:
                raise InvalidModel(f"the ONNX file is damaged at byte {at}: there is no wire type {kind}")
            if number == 0 or at + size > end:
                raise InvalidModel(f"the ONNX file is truncated or damaged: what begins at byte {at} ends beyond it")
            yield number, kind, at, at + size
            at += size

    def _messages(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Fields that are texts or messages."""
        for number, kind, at, stop in self._fields(start, end):
            if kind == _BYTES:
                yield number, at, stop

    def _text(self, at: int, end: int, what: str) -> str:
        if end - at > _MAX_TEXT:
            raise InvalidModel(f"{what} is {end - at} bytes long")
        try:
            return self._bytes(at, end - at).decode()
        except UnicodeDecodeError:
            raise InvalidModel(f"{what} is not UTF-8") from None

    # ---- the messages

    def model(self) -> OnnxFile:
        version = graphs = 0
        for number, kind, at, end in self._fields(0, self._member.size):
            if number == 1 and kind == _VARINT:
                version = at
            elif number == 7 and kind == _BYTES:
                graphs += 1
                self._graph(at, end, 0)
            elif number == 8 and kind == _BYTES:
                self._opset(at, end)
            elif number == 25 and kind == _BYTES:
                raise NotSupported("the ONNX file has functions of its own", hint="export it with inlined functions")
        if not 1 <= version <= MAX_IR_VERSION:
            raise NotSupported(f"the ONNX file has version {version}; up to {MAX_IR_VERSION} works")
        if graphs != 1:
            raise InvalidModel("the ONNX file has no graph" if not graphs else "the ONNX file has more than one graph")
        return self._file

    def _opset(self, start: int, end: int) -> None:
        domain, version = "", 0
        for number, kind, at, stop in self._fields(start, end):
            if number == 1 and kind == _BYTES:
                domain = self._text(at, stop, "the name of an operator set")
            elif number == 2 and kind == _VARINT:
                version = at
        if domain in ("", "ai.onnx") and not 1 <= version <= MAX_OPSET:
            raise NotSupported(f"the ONNX file uses operators of version {version}; up to {MAX_OPSET} works")

    def _graph(self, start: int, end: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise InvalidModel(f"the ONNX file has graphs more than {_MAX_DEPTH} deep in each other")
        for number, at, stop in self._messages(start, end):
            if number == 1:
                self._node(at, stop, depth)
            elif number == 5:
                self._weight(at, stop)
            elif number == 15:
                raise NotSupported("the ONNX file has sparse weights")
            elif number in (11, 12) and depth == 0:
                values = self._file.inputs if number == 11 else self._file.outputs
                if len(values) >= MAX_TENSORS:
                    raise InvalidModel("the ONNX file has too many inputs or outputs")
                values.append(self._value(at, stop))
        if depth == 0:
            # Before version 4 every weight was listed as an input, too.
            self._file.inputs = [each for each in self._file.inputs if each.name not in self._file.weights]
            if max(len(self._file.inputs), len(self._file.outputs)) > MAX_VALUES:
                raise InvalidModel(f"the ONNX file has more than {MAX_VALUES} inputs or outputs")

    def _node(self, start: int, end: int, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise InvalidModel(f"the ONNX file has more than {MAX_NODES} nodes")
        operator = domain = ""
        for number, at, stop in self._messages(start, end):
            if number == 4:
                operator = self._text(at, stop, "the name of an operator")
            elif number == 7:
                domain = self._text(at, stop, "the domain of an operator")
            elif number == 5:
                self._attribute(at, stop, depth)
        if domain not in _DOMAINS:
            raise NotSupported(
                f"the operator {operator[:60]!r} of {domain[:60]!r} is none of ONNX Runtime's own",
                hint="export the model without custom operators",
            )
        if operator in _NEVER_ENDING:
            raise NotSupported(f"the operator {operator!r} is not run: it may never end")
        self._file.operators[operator] += 1

    def _attribute(self, start: int, end: int, depth: int) -> None:
        for number, at, stop in self._messages(start, end):
            if number in (6, 11):
                self._graph(at, stop, depth + 1)
            elif number in (5, 10):
                self._tensor(at, stop)
            elif number in (22, 23):
                raise NotSupported("the ONNX file has sparse constants")

    def _weight(self, start: int, end: int) -> None:
        weight = self._tensor(start, end)
        weights = self._file.weights
        if len(weights) >= MAX_TENSORS:
            raise InvalidModel(f"the ONNX file has more than {MAX_TENSORS} weights")
        if not weight.name or weight.name in weights:
            raise InvalidModel(f"the weight {weight.name[:80]!r} has no name, or one that is there twice")
        weights[weight.name] = weight

    def _tensor(self, start: int, end: int) -> Weight:
        name, kind_number, packed = "", 0, 0
        shape: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, kind, at, stop in self._fields(start, end):
            if number == 1:
                shape += self._numbers(kind, at, stop)
                if len(shape) > _MAX_DIMENSIONS:
                    raise InvalidModel(f"the weight {name[:80]!r} has more than {_MAX_DIMENSIONS} dimensions")
            elif number == 2 and kind == _VARINT:
                kind_number = at
            elif number == 8 and kind == _BYTES:
                name = self._text(at, stop, "the name of a weight")
            elif number == 13 or (number == 14 and kind == _VARINT and at == 1):
                raise InvalidModel(
                    "the model's weights are in another file",
                    hint="export the model with its weights inside (below 2 GB)",
                )
            elif number in (4, 9, 10) and kind == _BYTES:
                spans.append((at, stop - at))
            elif number in (4, 5, 6, 7, 10, 11):
                packed += 1
        if kind_number not in _BITS and kind_number != 8:
            raise InvalidModel(f"the weight {name[:80]!r} has the unknown type {kind_number}")
        elements = 1
        for length in shape:
            elements *= length
        if elements >= 1 << 40 or any(length >= 1 << 40 for length in shape):
            raise InvalidModel(f"the weight {name[:80]!r} has the absurd shape {shape}")
        size = sum(each for _, each in spans)
        if spans and not packed and size * 8 < elements * _BITS.get(kind_number, 0):
            raise InvalidModel(f"the weight {name[:80]!r} has {size} bytes for {elements} values")
        return Weight(name, kind_number, tuple(shape), elements, tuple(spans))

    def _numbers(self, kind: int, at: int, end: int) -> list[int]:
        if kind == _VARINT:
            return [at]
        if kind != _BYTES or end - at > 10 * _MAX_DIMENSIONS:
            raise InvalidModel(f"the ONNX file is damaged at byte {at}: no list of dimensions")
        found: list[int] = []
        while at < end:
            value, at = self._varint(at, end)
            found.append(value)
        return found

    def _value(self, start: int, end: int) -> Value:
        name, kind_number = "", 0
        shape: list[int | None] = []
        for number, at, stop in self._messages(start, end):
            if number == 1:
                name = self._text(at, stop, "the name of an input or output")
            elif number == 2:
                for inner, inner_at, inner_stop in self._messages(at, stop):
                    if inner == 1:
                        kind_number, shape = self._tensor_type(inner_at, inner_stop)
        return Value(name, kind_number, tuple(shape))

    def _tensor_type(self, start: int, end: int) -> tuple[int, list[int | None]]:
        kind_number = 0
        shape: list[int | None] = []
        for number, kind, at, stop in self._fields(start, end):
            if number == 1 and kind == _VARINT:
                kind_number = at
            elif number == 2 and kind == _BYTES:
                for _, inner, inner_stop in self._messages(at, stop):
                    shape.append(self._dimension(inner, inner_stop))
                    if len(shape) > _MAX_DIMENSIONS:
                        raise InvalidModel(f"an input or output has more than {_MAX_DIMENSIONS} dimensions")
        return kind_number, shape

    def _dimension(self, start: int, end: int) -> int | None:
        for number, kind, at, _ in self._fields(start, end):
            if number == 1 and kind == _VARINT:
                return at
        return None
