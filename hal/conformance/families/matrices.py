"""Products of matrices."""

from __future__ import annotations

from ai_assistant.hal.conformance.families.row import FLOATS, Draw, Row, Sample


def _matmul(draw: Draw) -> Sample:
    rows, inner, columns = (draw.integer(1, 24) for _ in range(3))
    batch = draw.shape(0, 2, 3)
    kind = draw.integer(0, 3)
    fixed = frozenset({1}) if draw.flag() else frozenset[int]()  # weights
    if kind == 0:
        return Sample([draw.array((rows, inner), -1, 1), draw.array((inner, columns), -1, 1)], {}, fixed)
    if kind == 1:
        return Sample([draw.array((*batch, rows, inner), -1, 1), draw.array((inner, columns), -1, 1)], {}, fixed)
    if kind == 2:
        second = (*draw.broadcast(batch), inner, columns)
        return Sample([draw.array((*batch, rows, inner), -1, 1), draw.array(second, -1, 1)])
    shapes = draw.choice((((inner,), (inner, columns)), ((rows, inner), (inner,)), ((inner,), (inner,))))
    return Sample([draw.array(shape, -1, 1) for shape in shapes])


def _gemm(draw: Draw) -> Sample:
    rows, inner, columns = (draw.integer(1, 24) for _ in range(3))
    attributes: dict[str, int | float] = {}
    first, second = (rows, inner), (inner, columns)
    if draw.flag():
        attributes["transA"], first = 1, (inner, rows)
    if draw.flag():
        attributes["transB"], second = 1, (columns, inner)
    if draw.flag():
        attributes |= {"alpha": draw.number(0.25, 2), "beta": draw.number(0.25, 2)}
    inputs = [draw.array(first, -1, 1), draw.array(second, -1, 1)]
    if draw.flag():
        inputs.append(draw.array(draw.choice(((columns,), (1, columns), (rows, columns), (rows, 1), ())), -1, 1))
    fixed = frozenset(range(1, len(inputs))) if draw.flag() else frozenset[int]()
    return Sample(inputs, attributes, fixed)


def _einsum(draw: Draw) -> Sample:
    b, i, j, k = (draw.integer(1, 6) for _ in range(4))
    equation, shapes = draw.choice(
        (
            ("ij,jk->ik", ((i, j), (j, k))),
            ("bij,bjk->bik", ((b, i, j), (b, j, k))),
            ("bij,bkj->bik", ((b, i, j), (b, k, j))),
            ("ij->ji", ((i, j),)),
            ("ij,ij->i", ((i, j), (i, j))),
        )
    )
    return Sample([draw.array(shape, -1, 1) for shape in shapes], {"equation": equation})


ROWS = (
    Row("MatMul", FLOATS, _matmul, loose=4),
    Row("Gemm", FLOATS, _gemm, loose=4),
    Row("Einsum", FLOATS, _einsum, loose=4),
)
