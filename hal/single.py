"""A node by itself, for asking a library whether it runs it."""

from __future__ import annotations

from ai_assistant.hal.graph import NO_VALUE, Graph, Node, Value


def alone(node: Node, graph: Graph, *, most_elements: int | None = None) -> Graph:
    """A graph of one node with its constants.

    Args:
        most_elements: larger constants become inputs; None: they all stay.
    """
    order = dict.fromkeys(index for index in (*node.inputs, *node.outputs) if index != NO_VALUE)
    place = {index: number for number, index in enumerate(order)} | {NO_VALUE: NO_VALUE}
    values = []
    for index in order:
        value = graph.values[index]
        large = value.data is not None and most_elements is not None and value.data.size > most_elements
        values.append(Value(value.name, value.spec, None if large else value.data))
    inputs = dict.fromkeys(place[index] for index in node.inputs if index != NO_VALUE)
    outputs = tuple(place[index] for index in node.outputs)
    moved = Node(
        node.op, node.version, tuple(place[index] for index in node.inputs), outputs, node.attributes, node.domain
    )
    return Graph(
        tuple(values),
        (moved,),
        tuple(index for index in inputs if values[index].data is None),
        tuple(index for index in outputs if index != NO_VALUE),
        graph.opsets,
    )
