"""The published plans as rows: a program, a mesh with its prices, what is expected.

Expectations are formulas in bytes over the wire (one counter for every rival, per
device): all-gather and reduce-scatter B(n-1)/n of the whole array, all-reduce twice
that, all-to-all (B/n)(n-1)/n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.expert import programs
from benchmarks.expert.programs import Built

Spec = tuple[tuple[str, ...], ...]
ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"
REDUCE_SCATTER, ALL_TO_ALL = "reduce-scatter", "all-to-all"


@dataclass(frozen=True)
class Expected:
    """``count`` collectives of one kind over one axis, of ``num_bytes`` each."""

    kind: str
    axis: str
    num_bytes: float
    count: int = 1

    def wire_bytes(self, sizes: Mapping[str, int]) -> float:
        n = sizes[self.axis]
        share = self.num_bytes * (n - 1) / n
        times = {ALL_REDUCE: 2.0, ALL_TO_ALL: 1 / n}.get(self.kind, 1.0)
        return self.count * share * times


@dataclass(frozen=True)
class Row:
    """One published plan. ``beta``: seconds a byte, by axis (1 where not named)."""

    name: str
    what: str
    build: Callable[[], Built]
    mesh: Mapping[str, int]
    expected: tuple[Expected, ...]
    beta: Mapping[str, float] = field(default_factory=dict)
    pins: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def expected_seconds(self) -> float:
        return sum(
            self.beta.get(one.axis, 1.0) * one.wire_bytes(self.mesh)
            for one in self.expected
        )


def reduced(axis: str, *parts: tuple[float, int]) -> tuple[Expected, ...]:
    """All-reduces over one axis: (bytes, how many)."""
    return tuple(Expected(ALL_REDUCE, axis, size, n) for size, n in parts)


def dense(hidden: int, layers: int = 6, axis: str = "x") -> tuple[Expected, ...]:
    """Gradients of kernels and biases."""
    return reduced(axis, (4 * hidden * hidden, layers), (4 * hidden, layers))


def bert_gradients(hidden: int, axis: str, parts: int = 1) -> tuple[Expected, ...]:
    """Two layers: 12 H² of kernels, split in ``parts``; 4 H of norms."""
    return reduced(axis, (4 * 12 * hidden * hidden / parts, 2), (4 * 4 * hidden, 2))


ZERO3: Mapping[str, Spec] = {f"*/w{i}": (("x",), ()) for i in range(6)}
FAST = {"x": 1.0, "y": 0.1}


def rows() -> tuple[Row, ...]:
    """Every row, in the order of their names."""
    return (*_dense_rows(), *_bert_rows(), *_other_rows())


def _dense_rows() -> tuple[Row, ...]:
    small, large = 4 * 32 * 32, 4 * 32 * 256
    two_axes = (
        *reduced("x", (small / 2, 6), (4 * 32, 6)),
        *reduced("y", (4 * 256 * 32 / 2, 5)),
    )
    gathered = (
        Expected(ALL_GATHER, "x", small, 12),
        Expected(REDUCE_SCATTER, "x", small, 6),
        *reduced("x", (4 * 32, 6)),
    )
    pinned: Mapping[str, Spec] = {"batch/x": (("x",), ()), "batch/y": (("x",), ())}
    return (
        Row(
            "M1",
            "MLP, data parallel",
            lambda: programs.mlp(256, 32),
            {"x": 4},
            dense(32),
        ),
        Row(
            "M3",
            "M1 with ZeRO-3",
            lambda: programs.mlp(256, 32),
            {"x": 4},
            gathered,
            pins=ZERO3,
        ),
        Row(
            "M4",
            "MLP, tensor parallel",
            lambda: programs.mlp(32, 256),
            {"x": 4},
            reduced("x", (large, 5)),
        ),
        Row(
            "M6",
            "MLP on (2, 2)",
            lambda: programs.mlp(256, 32),
            {"x": 2, "y": 2},
            two_axes,
            FAST,
        ),
        Row(
            "M9a",
            "M4, batch on x of (4, 1)",
            lambda: programs.mlp(32, 256),
            {"x": 4, "y": 1},
            dense(256),
            pins=pinned,
        ),
        Row(
            "M9b",
            "M4, batch on x of (1, 4)",
            lambda: programs.mlp(32, 256),
            {"x": 1, "y": 4},
            reduced("y", (large, 5)),
            pins=pinned,
        ),
    )


def _bert_rows() -> tuple[Row, ...]:
    wide = 4 * 8 * 8 * 128
    return (
        Row(
            "B1",
            "BERT, data parallel",
            lambda: programs.bert(64, 64, 32),
            {"x": 4},
            bert_gradients(32, "x"),
        ),
        Row(
            "B2",
            "BERT, tensor parallel",
            lambda: programs.bert(8, 8, 128),
            {"x": 4},
            reduced("x", (wide, 7)),
        ),
        Row(
            "B4",
            "BERT on (2, 2)",
            lambda: programs.bert(8, 8, 128),
            {"x": 2, "y": 2},
            (*bert_gradients(128, "x", 2), *reduced("y", (wide / 2, 7))),
            FAST,
        ),
        Row(
            "B5",
            "BERT of batch 1",
            lambda: programs.bert(1, 8, 128),
            {"x": 1, "y": 4},
            reduced("y", (wide / 8, 7)),
        ),
        Row(
            "B6",
            "tied embedding on (2, 2)",
            lambda: programs.tied_embedding(8, 8, 1024, 8),
            {"x": 2, "y": 2},
            (
                *reduced("x", (4 * 1024 * 8 / 2, 1)),
                *reduced("y", (4 * 64 * 8 / 2, 2), (4 * 64 / 2, 2)),
            ),
            FAST,
        ),
    )


def _other_rows() -> tuple[Row, ...]:
    tokens = 4 * 64 * 16 * 64
    image = 4 * 8 * 16 * 16 * 256
    wide = 4 * 4 * 128 * 512
    return (
        Row(
            "E1",
            "mixture of experts",
            lambda: programs.moe(64, 16, 64, 16, 32, 4),
            {"x": 4},
            (
                Expected(ALL_TO_ALL, "x", 2 * tokens, 4),
                *reduced("x", (4 * 64 * 16, 1)),
            ),
        ),
        Row(
            "C1",
            "convolutions with batch norm",
            lambda: programs.conv(16, 16, 4, 3, norm=True),
            {"x": 4},
            reduced("x", (4 * 9 * 4 * 4, 3), (4 * 4, 6), (4 * 4, 12)),
        ),
        Row(
            "C2",
            "convolutions, tensor parallel",
            lambda: programs.conv(8, 16, 256, 4, norm=False),
            {"x": 4},
            reduced("x", (image, 3)),
        ),
        Row(
            "C3",
            "depthwise, tensor parallel",
            lambda: programs.depthwise(4, 8, 256),
            {"x": 4},
            reduced("x", (4 * 4 * 8 * 8 * 256, 1)),
        ),
        Row(
            "X1a",
            "dropout",
            lambda: programs.dropout_mlp(256, 32),
            {"x": 4},
            reduced("x", (4 * 32 * 32, 2)),
        ),
        Row(
            "X1b",
            "embedding",
            lambda: programs.embedding(256, 16, 64, 32),
            {"x": 4},
            reduced("x", (4 * 64 * 32, 1)),
        ),
        Row(
            "X2",
            "reshape, argmax",
            lambda: programs.reshaped(6, 8),
            {"x": 4},
            (),
        ),
        Row(
            "X3",
            "x @ y + x @ y",
            lambda: programs.two_products(64, 256),
            {"x": 4},
            reduced("x", (4 * 64 * 64, 1)),
            pins={"*/x": ((), ("x",)), "*/y": (("x",), ())},
        ),
        Row(
            "X4a",
            "attention forward",
            lambda: programs.attention_forward(4, 128, 512, 16),
            {"x": 4},
            reduced("x", (wide, 1)),
            pins={"result": ((), (), ())},
        ),
        Row(
            "X4b",
            "attention forward on (4, 4)",
            lambda: programs.attention_forward(4, 128, 512, 16),
            {"x": 4, "y": 4},
            reduced("y", (wide / 4, 1)),
            pins={"result": (("x",), (), ())},
        ),
        Row(
            "X5a",
            "12 layers, data parallel",
            lambda: programs.plain_mlp(256, 32, 12),
            {"x": 4},
            reduced("x", (4 * 32 * 32, 12)),
        ),
        Row(
            "X5b",
            "12 layers, tensor parallel",
            lambda: programs.plain_mlp(32, 256, 12),
            {"x": 4},
            reduced("x", (4 * 32 * 256, 11)),
        ),
        *(_grid(m0, m1) for m0, m1 in ((4, 8), (8, 4), (3, 4))),
        Row(
            "G1",
            "gradients accumulated",
            lambda: programs.accumulate(256, 32),
            {"x": 1, "y": 4},
            dense(32, axis="y"),
        ),
    )


def _grid(m0: int, m1: int) -> Row:
    batch, hidden = 768, 256
    return Row(
        f"X5 {m0}x{m1}",
        "12 layers on two axes",
        lambda: programs.plain_mlp(batch, hidden, 12),
        {"x": m0, "y": m1},
        (
            *reduced("x", (4 * hidden * hidden / m1, 12)),
            *reduced("y", (4 * batch * hidden / m0, 11)),
        ),
    )
