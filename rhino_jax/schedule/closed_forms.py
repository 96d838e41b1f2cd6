"""What a schedule takes and keeps where all stages are equal and sending is free.

Simulations must give the same (``tests/schedule``); the search of stages starts from
these. p workers, m microbatches, v stages a worker; seconds of one stage and one
microbatch: f forward, b backward (of a split one its input half), w its weight half.
"""

from __future__ import annotations


def makespan_seconds(
    name: str,
    num_workers: int,
    num_microbatches: int,
    stages_per_worker: int = 1,
    *,
    forward: float,
    backward: float,
    weight: float = 0,
) -> float:
    """From the first task's start to the last one's end.

    gpipe, 1f1b, eager_1f1b: (m + p - 1) (f + b) (Narayanan et al. 2021, arXiv
    2104.04473, section 2.2.1). interleaved: (m v + p - 1) (f + b), its bubble v times
    smaller (section 2.2.2); so circular (Lamy-Poirier 2022, arXiv 2211.05953). With
    m < p, each of the v - 1 ways back to the first worker takes p turns in place of m.

    zero_bubble: m (f + b + w) + (p - 1) (f + b - w) (ZB-H1: Qi et al. 2023, arXiv
    2401.10241, table 1); with m < p there are weight halves for m - 1 of its p - 1 gaps
    alone. Weight halves longer than f or b stand out of those gaps: from m = p on, the
    bubble is then (p - 1) (f + b - min(f, b, w)).

    Args:
        name: of the schedule.
        num_workers: p.
        num_microbatches: m.
        stages_per_worker: v.
        forward: f.
        backward: b; of whole backward tasks both halves.
        weight: w, of zero_bubble alone; with m < p no more than f and b.

    >>> makespan_seconds("1f1b", 4, 8, forward=1, backward=2)
    33
    >>> makespan_seconds("zero_bubble", 4, 8, forward=1, backward=1, weight=1)
    27
    """
    p, m, v = num_workers, num_microbatches, stages_per_worker
    both = forward + backward
    if name != "zero_bubble":
        return ((v - 1) * max(m, p) + m + p - 1) * both
    if m < p:
        return (m + p - 1) * both + weight
    hidden = min(forward, backward, weight)
    return m * (both + weight) + (p - 1) * (both - hidden)


def in_flight(
    name: str, num_workers: int, num_microbatches: int, stages_per_worker: int = 1
) -> tuple[int, ...]:
    """Worker -> the most pairs of stage and microbatch that it keeps at once.

    Worker r of 1f1b keeps min(p - r, m) (Narayanan et al. 2021, arXiv 2006.09503), of
    eager_1f1b 2 (p - r) - 1 (Zhuang et al. 2023, arXiv 2211.05322), of zero_bubble p
    (arXiv 2401.10241), of gpipe and circular all. interleaved: (v - 1) p + 2 (p - r) -
    1, which makes worker 0's 1 + (p - 1) / (p v) times all its stages (Korthikanti et
    al. 2022, arXiv 2205.05198, section 4.2.3); where m is no multiple of p, with the
    length of the longest group for the first p.

    >>> in_flight("1f1b", 4, 8), in_flight("interleaved", 4, 8, 2)
    ((4, 3, 2, 1), (11, 9, 7, 5))
    """
    p, m, v = num_workers, num_microbatches, stages_per_worker
    most = {
        "1f1b": [p - r for r in range(p)],
        "eager_1f1b": [2 * (p - r) - 1 for r in range(p)],
        "zero_bubble": [p] * p,
    }
    if name == "interleaved":
        longest = -(-m // max(1, m // p))
        lead = (v - 1) * longest
        ahead = most["1f1b" if v == 1 else "eager_1f1b"]
        most[name] = [lead + count for count in ahead]
    return tuple(min(count, m * v) for count in most.get(name, [m * v] * p))
