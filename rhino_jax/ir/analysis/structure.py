"""All that is known of a Program's structure, found in one go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rhino_jax.ir.analysis.classes import SegmentClass, segment_classes
from rhino_jax.ir.analysis.cuts import MOST, cuts
from rhino_jax.ir.analysis.globals_ import Global, global_values
from rhino_jax.ir.analysis.loops import LoopPair, loop_pairs
from rhino_jax.ir.analysis.regions import Regions, regions
from rhino_jax.ir.analysis.repeats import group_repeats
from rhino_jax.ir.analysis.segments import Segmentation, segments
from rhino_jax.ir.program import Program


@dataclass(frozen=True)
class Structure:
    """Regions of a Program, its segments and their classes, globals and loop pairs.

    ``fine`` is the division at every cut (an attention and an mlp, say), ``blocks``
    the one that keeps only cuts between repeats of a pattern (whole layers). Classes,
    globals and the rest of the search may use either; ``classes`` are those of
    ``blocks``, ``fine_classes`` of ``fine``.
    """

    regions: Regions
    fine: Segmentation
    fine_classes: tuple[SegmentClass, ...]
    blocks: Segmentation
    classes: tuple[SegmentClass, ...]
    globals_: tuple[Global, ...]
    loops: tuple[LoopPair, ...]


def analyze(
    program: Program,
    pairs: Mapping[int, int],
    batch_inputs: Collection[int],
    heavy: Collection[str],
    most: int = MOST,
) -> Structure:
    """The structure of ``program``, in time about linear in its size.

    Args:
        program: the traced step.
        pairs: positions of state inputs, and of the outputs that succeed them.
        batch_inputs: positions of what a call brings anew.
        heavy: kinds of ops whose cost is arithmetic.
        most: how many heavy values a cut may carry.
    """
    found = regions(program, pairs, batch_inputs)
    places = cuts(program, found, pairs, heavy, most)
    fine = segments(program, found, places, pairs, heavy)
    fine_classes = segment_classes(program, found, fine, pairs)
    names = {i: c.digest for c in fine_classes for i in c.members}
    groups = group_repeats([names[i] for i in range(len(fine.segments))])
    kept = [places[stop - 1] for _, stop in groups if stop <= len(places)]
    blocks = segments(program, found, kept, pairs, heavy)
    return Structure(
        found,
        fine,
        fine_classes,
        blocks,
        segment_classes(program, found, blocks, pairs),
        global_values(program, found, blocks),
        loop_pairs(program, found.batch),
    )
