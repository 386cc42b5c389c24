"""ONNX's reference evaluator, also where onnxruntime has been loaded before.

Debian's onnx and onnxruntime stand on one library, so onnxruntime's own operators are among ONNX's from then on; the
reference refuses to be imported when two operators of different domains have one name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import onnx.defs

_OWN = frozenset({"", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training"})


def load() -> Any:
    """The class `onnx.reference.ReferenceEvaluator`."""
    if "onnx.reference" not in sys.modules:
        every = onnx.defs.get_all_schemas_with_history
        onnx.defs.get_all_schemas_with_history = lambda: [each for each in every() if each.domain in _OWN]
        try:
            import_module("onnx.reference")
        finally:
            onnx.defs.get_all_schemas_with_history = every
    return sys.modules["onnx.reference"].ReferenceEvaluator
