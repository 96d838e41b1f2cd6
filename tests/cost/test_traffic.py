"""Bytes that kernels move: by hand, and against the definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cost.buffers import unfold
from rhino_jax.cost.fusion import fusion
from rhino_jax.cost.traffic import traffic
from rhino_jax.ir.program import Op, Program
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, by_role, program, whole

TABLE = (64, 256)
KB64 = 64 * 256 * 4  # bytes of a TABLE of float32
ROW, COLUMN = 256 * 4, 64 * 4


def moved(of: Program) -> tuple[int, ...]:
    unfolded = unfold(of, whole(of), ONE, rule_of)
    return tuple(one.num_bytes for one in traffic(unfolded, fusion(unfolded)))


def summed(read: int, made: int, axis: int) -> tuple[object, ...]:
    return ("reduce_sum", (read,), (made,), (("axes", (axis,)),))


def spread(read: int, made: int, dim: int) -> tuple[object, ...]:
    params = (("broadcast_dimensions", (dim,)), ("shape", TABLE))
    return ("broadcast_in_dim", (read,), (made,), params)


def test_a_chain_reads_once_and_writes_once() -> None:
    ops = [("sin", (0,), (1,)), ("cos", (1,), (2,)), ("neg", (2,), (3,))]
    assert moved(program([TABLE] * 4, (0,), ops, (3,))) == (0, 0, 2 * KB64)


def test_two_kernels_of_one_pass_read_an_array_once() -> None:
    ops = [("sin", (0,), (1,)), ("cos", (0,), (2,))]
    assert moved(program([TABLE] * 3, (0,), ops, (1, 2))) == (2 * KB64, KB64)


def test_what_waits_for_a_kernel_reads_again() -> None:
    # Whole sums over rows, then each element with its column's sum: a second pass.
    ops = [summed(0, 1, 0), spread(1, 2, 1), ("add", (0, 2), (3,))]
    of = program([TABLE, (256,), TABLE, TABLE], (0,), ops, (3,))
    assert moved(of) == (KB64 + ROW, 0, KB64 + ROW + KB64)


def test_a_row_is_still_at_hand() -> None:
    # As in a softmax or a layer norm: sums along the last dimension.
    ops = [summed(0, 1, 1), spread(1, 2, 0), ("add", (0, 2), (3,))]
    of = program([TABLE, (64,), TABLE, TABLE], (0,), ops, (3,))
    assert moved(of) == (KB64 + COLUMN, 0, COLUMN + KB64)


def test_kernels_over_rows_share_with_no_others() -> None:
    ops = [summed(0, 1, 1), summed(0, 2, 0)]
    of = program([TABLE, (64,), (256,)], (0,), ops, (1, 2))
    assert moved(of) == (KB64 + COLUMN, KB64 + ROW)


def test_a_sum_of_what_an_elementwise_kernel_writes_is_part_of_it() -> None:
    ops = [("add", (0, 1), (2,)), summed(2, 3, 0)]
    of = program([TABLE, TABLE, TABLE, (256,)], (0, 1), ops, (2, 3))
    assert moved(of) == (3 * KB64, ROW)


def test_products_read_all_of_their_operands() -> None:
    ops = [("mystery", (0,), (1,)), ("mystery", (0,), (2,))]
    of = program([TABLE] * 3, (0,), ops, (1, 2))
    assert moved(of) == (2 * KB64, 2 * KB64)


def test_a_slice_reads_what_it_makes() -> None:
    params = (("start_indices", (0, 0)), ("limit_indices", (8, 256)), ("strides", None))
    of = program([TABLE, (8, 256)], (0,), [("slice", (0,), (1,), params)], (1,))
    assert moved(of) == (2 * KB64 // 8,)


# ---- against the definition ----------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, tuple[int, ...]]:
    count = draw(st.integers(1, 3))
    kinds = st.sampled_from(["fused", "reducing", "opaque"])
    made = draw(st.lists(kinds, max_size=9))
    total = count + len(made)
    sizes = draw(st.lists(st.integers(1, 60), min_size=total, max_size=total))
    ops = []
    for n, kind in enumerate(made):
        known = st.integers(0, count + n - 1)
        reads = draw(st.lists(known, min_size=1, max_size=3, unique=True))
        ops.append((kind, tuple(reads), (count + n,)))
    outputs = tuple(draw(st.lists(st.integers(0, total - 1), max_size=3, unique=True)))
    of = program([(size,) for size in sizes], tuple(range(count)), ops, outputs)
    return of, tuple(sizes)


def definition(of: Program, sizes: tuple[int, ...], real: tuple[bool, ...]) -> int:
    """All bytes, by the longest way from the inputs to each kernel."""
    maker = {op.results[0]: op for op in of.ops}

    def sources(value: int) -> set[int]:
        if value not in maker or real[value]:
            return {value}
        return {s for read in maker[value].operands for s in sources(read)}

    def all_sources(op: Op) -> set[int]:
        return {s for read in op.operands for s in sources(read)}

    def when(value: int) -> int:
        """The pass of the kernel that writes ``value``."""
        op = maker[value]
        if op.kind == "opaque":
            return max(when(s) + 1 if s in maker else 0 for s in all_sources(op))
        return max((there(s, op) for s in all_sources(op)), default=0)

    def there(source: int, reader: Op) -> int:
        if source not in maker:
            return 0
        joined = reader.kind == "reducing" and maker[source].kind == "fused"
        return when(source) if joined else when(source) + 1

    read: set[tuple[int, int]] = set()
    total = 0
    for op in of.ops:
        (made,) = op.results
        if not real[made]:
            continue
        total += sizes[made]
        if op.kind == "opaque":
            total += sum(sizes[v] for v in op.operands)
            continue
        for s in all_sources(op):
            joined = op.kind == "reducing" and s in maker and maker[s].kind == "fused"
            if not (joined and when(s) == when(made)):
                read.add((s, when(made)))
    return 4 * (total + sum(sizes[s] for s, _ in read))


@given(programs())
def test_traffic_is_that_of_the_definition(
    drawn: tuple[Program, tuple[int, ...]],
) -> None:
    of, sizes = drawn
    unfolded = unfold(of, whole(of), ONE, by_role)
    fused = fusion(unfolded)
    number = {b.value: n for n, b in enumerate(unfolded.buffers)}
    used = range(len(of.values))
    real = tuple(v not in number or fused.written[number[v]] for v in used)
    assert sum(one.num_bytes for one in traffic(unfolded, fused)) == definition(
        of, sizes, real
    )
