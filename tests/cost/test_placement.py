"""Placing buffers: against a plain reading of the rule, and what must hold of any."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cost.placement import Span, peak_bytes, placed_bytes

SPANS = st.lists(
    st.builds(
        lambda size, first, length: Span(size, first, first + length),
        st.integers(1, 9),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=14,
)


def plainly(spans: list[Span]) -> int:
    """Best fit by scanning every offset at which something ends."""
    placed: list[tuple[Span, int]] = []
    for span in spans:
        beside = [
            (at, at + other.num_bytes)
            for other, at in placed
            if other.first <= span.last and span.first <= other.last
        ]
        fitting = []
        for start in {0, *(end for _, end in beside)}:
            above = [low for low, high in beside if high > start]
            room = min(above, default=None)
            if room is None or room - start >= span.num_bytes:
                fitting.append((room is None, (room or 0) - start, start))
        placed.append((span, min(fitting)[2]))
    return max(at + span.num_bytes for span, at in placed)


@given(SPANS)
def test_the_better_of_two_orders_by_best_fit(spans: list[Span]) -> None:
    by_size = sorted(spans, key=lambda s: (-s.num_bytes, s.first - s.last, s.first))
    by_life = sorted(spans, key=lambda s: (s.first - s.last, -s.num_bytes, s.first))
    assert placed_bytes(spans) == min(plainly(by_size), plainly(by_life))


@given(SPANS)
def test_no_less_than_what_stands_at_once(spans: list[Span]) -> None:
    held = [
        sum(s.num_bytes for s in spans if s.first <= tick <= s.last)
        for tick in range(max(s.last for s in spans) + 1)
    ]
    assert peak_bytes(spans) == max(held)
    assert peak_bytes(spans) <= placed_bytes(spans) <= sum(s.num_bytes for s in spans)


def test_what_never_meets_shares_memory() -> None:
    assert placed_bytes([Span(size, size, size) for size in (7, 3, 5)]) == 7
    assert placed_bytes([]) == 0


def test_a_buffer_in_the_middle_parts_what_is_free() -> None:
    # Whatever is put first, two that stay leave holes of 2 where 3 is wanted.
    spans = [Span(2, 0, 2), Span(2, 2, 4), Span(2, 1, 3), Span(3, 4, 6), Span(1, 3, 6)]
    assert peak_bytes(spans) == 6 <= placed_bytes(spans)
