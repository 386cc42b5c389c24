"""python3 -m ai_assistant.hal.detect.product: times a matrix product by onnxruntime and prints fp32 TFLOP/s.

Run by `measure`, in a process of its own. Exit status 1: onnxruntime is not installed.
"""

from __future__ import annotations

import sys
import time

SIDE = 1024
ROUNDS = 6


def main() -> int:
    try:
        import numpy as np
        import onnxruntime as ort
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    session = ort.InferenceSession(model(SIDE), providers=["CPUExecutionProvider"])
    ones = {name: np.ones((SIDE, SIDE), np.float32) for name in "ab"}
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        session.run(None, ones)
        best = max(best, 2 * SIDE**3 / max(time.perf_counter() - start, 1e-9))
    print(best / 1e12)
    return 0


def model(n: int) -> bytes:
    """An ONNX model of c = a × b, all n × n, fp32. Written field by field (onnx.proto), so that it needs no library."""
    side = _field(1, _field(1, n))
    float32 = _field(1, _field(1, 1) + _field(2, side + side))
    a, b, c = (_field(1, name) + _field(2, float32) for name in (b"a", b"b", b"c"))
    node = _field(1, b"a") + _field(1, b"b") + _field(2, b"c") + _field(4, b"MatMul")
    graph = _field(1, node) + _field(2, b"product") + _field(11, a) + _field(11, b) + _field(12, c)
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 17))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, value = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(value) if value else bytes([low])


if __name__ == "__main__":
    sys.exit(main())
