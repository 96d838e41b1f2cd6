"""What is planned: a Program, and which of its inputs and outputs play which part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rhino_jax.ir.analysis.cuts import cuts
from rhino_jax.ir.analysis.regions import Regions, regions
from rhino_jax.ir.analysis.segments import Segmentation, segments
from rhino_jax.ir.depends import parameters
from rhino_jax.ir.program import Program
from rhino_jax.rules import HEAVY, rule_of


@dataclass(frozen=True)
class Subject:
    """A Program with the paths of its leaves and the pairs that make up its state.

    ``state_pairs`` are (input, output) positions: the output is the input's
    successor. Inputs past ``len(input_paths)`` are constants of the trace.
    """

    program: Program
    input_paths: tuple[str, ...]
    output_paths: tuple[str, ...]
    state_pairs: tuple[tuple[int, int], ...]

    @property
    def pairs(self) -> Mapping[int, int]:
        return dict(self.state_pairs)

    @cached_property
    def regions(self) -> Regions:
        """Which ops are the forward pass, the backward pass, the epilogue."""
        return regions(self.program, self.pairs, self.batch_inputs)

    @cached_property
    def segmentation(self) -> Segmentation:
        """The step divided at its cuts."""
        places = cuts(self.program, self.regions, self.pairs, HEAVY)
        return segments(self.program, self.regions, places, self.pairs, HEAVY)

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """State inputs (positions) that the loss depends on."""
        return parameters(self.program, self.pairs)

    @cached_property
    def batch_inputs(self) -> tuple[int, ...]:
        """Inputs that are neither state nor constant."""
        state = self.pairs
        return tuple(i for i in range(len(self.input_paths)) if i not in state)

    @cached_property
    def batch_size(self) -> int:
        """The leading dimension that most batch inputs share; 1 where none has one."""
        shapes = [self.shape(i) for i in self.batch_inputs]
        counts = Counter(shape[0] for shape in shapes if shape)
        return max(counts, key=lambda n: (counts[n], n)) if counts else 1

    def shape(self, position: int) -> tuple[int, ...]:
        """The shape of the input at ``position``."""
        return self.program.values[self.program.inputs[position]].shape

    @cached_property
    def kin(self) -> Mapping[int, int]:
        """State input -> the first state input it is combined with element by element.

        A parameter, its gradient, its moments and its average lie alike: each meets
        the others in elementwise ops, where another layout would have to be moved.
        """
        program = self.program
        leader = list(range(len(program.values)))

        def find(v: int) -> int:
            while leader[v] != v:
                leader[v] = leader[leader[v]]
                v = leader[v]
            return v

        for op in program.ops:
            if op.programs:
                continue
            rule = rule_of(program, op)
            dims = rule.results[0] if rule.results else ()
            shape = program.values[op.results[0]].shape if op.results else ()
            if not shape or any(len(d) != 1 for d in dims):
                continue
            alike = [
                v
                for v, other in zip(op.operands, rule.operands, strict=True)
                if other == dims and program.values[v].shape == shape
            ]
            for v in alike:
                leader[find(v)] = find(op.results[0])
        first: dict[int, int] = {}
        found = {}
        # Parameters lead their kin, whatever the order of the inputs.
        order = [*self.parameters, *(i for i in self.pairs if i not in self.parameters)]
        for i in order:
            root = find(program.inputs[i])
            found[i] = first.setdefault(root, i)
        return found

    @cached_property
    def stacked(self) -> Mapping[int, bool]:
        """Parameters (positions) whose leading dimension is that of a scan."""
        program = self.program
        origin = {v: i for i, v in enumerate(program.inputs)}
        found = dict.fromkeys(self.parameters, False)
        for op in program.ops:
            if op.kind == "scan":
                whole = op.param["num_consts"] + op.param["num_carry"]
                for v in op.operands[whole:]:
                    if origin.get(v, -1) in found:
                        found[origin[v]] = True
            elif not op.programs and len(op.operands) == 1 and len(op.results) == 1:
                v = op.operands[0]
                same = program.values[v].shape == program.values[op.results[0]].shape
                if v in origin and same:
                    origin[op.results[0]] = origin[v]
        return found
