"""Shapes by the ONNX library, kept away from what makes its native code crash."""

from __future__ import annotations

from typing import Any

from ai_assistant.errors import InvalidModel

STANDARD = ("", "ai.onnx")
_WITHHELD = "withheld"
"""A domain that the library does not know, so that it passes over the operator."""


def infer(model: Any) -> Any:
    """The `onnx.GraphProto` with what can be told of its values. The model's nodes must be in order.

    Einsum is withheld until the dimensions of what it reads are known to fit its equation: the library (1.17) reads
    beyond the shape of an operand that has fewer dimensions than its term has letters.

    Raises:
        InvalidModel: the types contradict each other.
    """
    import onnx

    numbers = [n for n, node in enumerate(model.graph.node) if node.op_type == "Einsum" and node.domain in STANDARD]
    if not numbers:
        return _inferred(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.opset_import.add(domain=_WITHHELD, version=1)
    waiting = [changed.graph.node[number] for number in numbers]
    for node in waiting:
        node.domain = _WITHHELD
    while True:
        graph = _inferred(changed)
        ranks = _ranks(graph)
        ready = [node for node in waiting if _fits(node, ranks)]
        if not ready:
            return graph
        for node in ready:
            node.domain = ""
        waiting = [node for node in waiting if node.domain == _WITHHELD]


def _inferred(model: Any) -> Any:
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=False, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        short = " ".join(str(error).split())[:200]
        raise InvalidModel(f"the model's types contradict each other: {short}") from error


def _ranks(graph: Any) -> dict[str, int]:
    """Name → dimensions; the least, where a file says it twice."""
    found: dict[str, int] = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.value_info, *graph.output, *graph.input):
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            rank = len(info.type.tensor_type.shape.dim)
            found[info.name] = min(rank, found.get(info.name, rank))
    return found


def _fits(node: Any, ranks: dict[str, int]) -> bool:
    """Whether every operand is known to have a dimension for each letter.

    Raises:
        InvalidModel: one has not, or there is no equation for these operands.
    """
    if [(each.name, each.type) for each in node.attribute] != [("equation", 3)]:
        raise InvalidModel("an Einsum has one attribute, its equation")
    terms = node.attribute[0].s.decode(errors="replace").partition("->")[0].split(",")
    if len(terms) != len(node.input):
        raise InvalidModel(f"an Einsum of {len(node.input)} operands has an equation for {len(terms)}")
    known = True
    for term, name in zip(terms, node.input, strict=True):
        letters = sum(not each.isspace() and each != "." for each in term)
        if name not in ranks:
            known = False
        elif letters > ranks[name]:
            raise InvalidModel(f"an Einsum's operand has {ranks[name]} dimensions, its equation names {letters}")
    return known
