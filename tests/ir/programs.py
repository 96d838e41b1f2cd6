"""Random small Programs that hold every law."""

from __future__ import annotations

from hypothesis import strategies as st

from rhino_jax.ir.program import Op, Program, Value

SHAPE = (2, 3)
KINDS = ("sin", "neg", "add", "mul")


@st.composite
def programs(draw: st.DrawFn, depth: int = 2, inputs: int = 0) -> Program:
    """A Program over arrays of one shape, with loops and branches inside."""
    count = inputs or draw(st.integers(1, 3))
    values = [Value(SHAPE, "float32") for _ in range(count)]
    known = list(range(count))
    ops = []

    def new() -> int:
        values.append(Value(SHAPE, "float32", weak=draw(st.booleans())))
        known.append(len(values) - 1)
        return len(values) - 1

    def read() -> int:
        if draw(st.integers(0, 5)):
            return draw(st.sampled_from(known))
        literal = draw(st.sampled_from([0, 1.5, True, -2]))
        values.append(Value((), "float32", literal=literal))
        return len(values) - 1

    for _ in range(draw(st.integers(0, 4))):
        if depth and not draw(st.integers(0, 3)):
            body = draw(programs(depth - 1, inputs=2))
            body = Program(body.values, body.inputs, body.ops, body.outputs[:1], "body")
            operands = (draw(st.sampled_from(known)), draw(st.sampled_from(known)))
            ops.append(Op("remat2", operands, (new(),), (), (body,)))
            continue
        kind = draw(st.sampled_from(KINDS))
        operands = tuple(read() for _ in range(1 if kind in ("sin", "neg") else 2))
        ops.append(Op(kind, operands, (new(),), (("axes", draw(_PARAM)),)))
    outputs = tuple(draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)))
    return Program(tuple(values), tuple(range(count)), tuple(ops), outputs)


_PARAM = st.one_of(st.none(), st.integers(0, 3), st.just((0, 1)), st.just("mode"))
