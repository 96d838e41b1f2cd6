"""Matches written into the Program: attention ops in place of products and a softmax.

Products that a match replaces are made by the op instead, rearranged where the op has
its arrays otherwise; what they were made of is then read by nobody and falls away. A
reverse scan's op reads what its forward scan has: two more stacks are handed over (the
result and the sums of exponentials), for those of scores that are not any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.ir.program import Op, Program, Value, Where, accumulator_dtype
from rhino_jax.ir.prune import pruned
from rhino_jax.rules.attention import BACKWARD, FORWARD, VENDOR, vendor_takes
from rhino_jax.search.recognize.products import Array, Made, Match, views
from rhino_jax.search.recognize.scopes import SHAPES, Name, Scopes, moved, places

Axes = tuple[str, ...]
"""What an op's dimension is the product of, by labels."""
LAYOUTS: tuple[tuple[str, ...], ...] = (("b", "t", "hg"), ("b", "hg", "t"))
"""By the op's parameter ``layout``: how it has its arrays, before depth."""


class Unreachable(Exception):
    """An array is in a loop from which it can not be handed on."""


@dataclass
class _Edit:
    """What becomes of one scope's Program."""

    values: list[Value]
    before: dict[int, list[Op]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    inputs: dict[str, list[tuple[int, int]]] = field(
        default_factory=lambda: {"consts": [], "xs": []}
    )
    """What the body is given more: value outside, value inside."""
    outputs: list[tuple[int, int]] = field(default_factory=list)
    """What a scan's body gives more: value inside, stack outside."""
    empty: dict[str, int] = field(default_factory=dict)

    def new(self, shape: Sequence[int], dtype: str) -> int:
        self.values.append(Value(tuple(shape), dtype))
        return len(self.values) - 1


class Rewriting:
    """A Program being rewritten."""

    def __init__(self, scopes: Scopes) -> None:
        self.scopes = scopes
        self.edits = [_Edit(list(s.program.values)) for s in scopes.all]
        self.inside = {(at, name): v for (at, v), name in scopes.origin.items()}
        """By scope and array: the input that it is there."""

    def add(self, match: Match) -> None:
        """Write one match.

        Raises:
            Unreachable: the backward pass can not be handed what it reads.
        """
        layout, gradient = self._layout(match), match.gradient
        made: tuple[Name, Name] | None = None
        if match.result is not None:
            at = match.result.scope, match.result.op
            made = self._forward(match, layout, *at)
        if gradient is None:
            return
        parts = (gradient.queries, gradient.keys, gradient.values)
        scope, first = parts[0].scope, min(part.op for part in parts)
        if any(part.scope != scope for part in parts):
            raise Unreachable
        out, sums = made or self._forward(match, layout, scope, first)
        self._backward(match, layout, scope, first, sums, out)

    # ---- ops -------------------------------------------------------------------------

    def _forward(
        self, match: Match, layout: int, scope: int, at: int
    ) -> tuple[Name, Name]:
        """The op before op ``at`` of a scope; its result and its sums."""
        size = match.sizes
        operands = self._operands(match, layout, scope, at)
        if match.result is None:
            shape = self._shape(match, layout, "tge")
            out = self.edits[scope].new(shape, self._dtype(match.values))
        else:
            out = self._result(match, layout, "tge", match.result)
        wide = accumulator_dtype(self._dtype(match.queries))
        shape = size["b"], size["h"] * size["g"], size["t"]
        sums = self.edits[scope].new(shape, wide)
        params = self._params(match, layout, is_training=True)
        self._emit(scope, at, FORWARD, operands, (out, sums), params)
        return (scope, out), (scope, sums)

    def _backward(
        self, match: Match, layout: int, scope: int, at: int, sums: Name, out: Name
    ) -> None:
        gradient = match.gradient
        assert gradient is not None
        operands = self._operands(match, layout, scope, at)
        operands += [self._bring(scope, sums), self._bring(scope, out)]
        cotangent = gradient.cotangent
        operands.append(self._arranged(match, layout, "tge", cotangent, scope, at))
        parts = (
            (gradient.queries, "tgd"),
            (gradient.keys, "ud"),
            (gradient.values, "ue"),
        )
        found = [self._result(match, layout, own, part) for part, own in parts]
        params = self._params(match, layout)
        self._emit(scope, at, BACKWARD, operands, found, params)

    def _operands(self, match: Match, layout: int, scope: int, at: int) -> list[int]:
        """Queries, keys, values, and seven arrays that say nothing."""
        arrays = (match.queries, "tgd"), (match.keys, "ud"), (match.values, "ue")
        found = [
            self._arranged(match, layout, own, array, scope, at)
            for array, own in arrays
        ]
        dtype = self.scopes.value(match.queries.name).dtype
        return [*found, *[self._nothing(scope, dtype)] * 7]

    def _nothing(self, scope: int, dtype: str) -> int:
        """An array of no elements."""
        edit = self.edits[scope]
        if dtype not in edit.empty:
            edit.values.append(Value((), dtype, literal=0.0))
            zero = len(edit.values) - 1
            edit.empty[dtype] = edit.new((0,), dtype)
            params = {"broadcast_dimensions": (), "shape": (0,), "sharding": None}
            made = (edit.empty[dtype],)
            self._emit(scope, 0, "broadcast_in_dim", (zero,), made, params)
        return edit.empty[dtype]

    def _params(self, match: Match, layout: int, **more: object) -> dict[str, object]:
        return {
            "scale": match.scale,
            "seed": 42,
            "dropout_rate": 0.0,
            "variadic_args": (False, False),
            "mask_type": "CAUSAL" if match.causal else "NO_MASK",
            "layout": layout,
            "sliding_window_length": match.window,
            VENDOR: self._vendor(match),
            **more,
        }

    def _vendor(self, match: Match) -> bool:
        """Whether cuDNN's kernels take the arrays, in the backward pass too."""
        arrays = [match.queries, match.keys, match.values]
        if match.gradient is not None:
            arrays.append(match.gradient.cotangent)
        held = [self.scopes.value(array.name) for array in arrays]
        deep = [match.sizes[x] for x in "dee"]
        made = [self._dtype(match.result)] if match.result is not None else []
        dtypes = [*(v.dtype for v in held), *made]
        return vendor_takes(
            [Value((n,), dtype) for dtype in dtypes for n in dict.fromkeys(deep)]
        )

    def _emit(
        self,
        scope: int,
        at: int,
        kind: str,
        operands: Sequence[int],
        results: Sequence[int],
        params: Mapping[str, object],
    ) -> None:
        ops = self.scopes.all[scope].program.ops
        where = ops[at].where if ops else Where()
        plain = tuple(sorted(params.items()))
        op = Op(kind, tuple(operands), tuple(results), plain, where=where)
        self.edits[scope].before.setdefault(at, []).append(op)

    def _dtype(self, what: Array | Made) -> str:
        if isinstance(what, Array):
            return self.scopes.value(what.name).dtype
        program = self.scopes.all[what.scope].program
        return program.values[program.ops[what.op].results[0]].dtype

    # ---- arrangements ----------------------------------------------------------------

    def _layout(self, match: Match) -> int:
        """The op's layout that most of its operands have."""
        arrays = [(match.queries, "tgd"), (match.keys, "ud"), (match.values, "ue")]
        if match.gradient is not None:
            arrays.append((match.gradient.cotangent, "tge"))

        def fitting(layout: int) -> int:
            return sum(
                self._exact(match, layout, own, array) is not None
                for array, own in arrays
            )

        return max(range(len(LAYOUTS)), key=fitting)

    def _axes(self, layout: int, own: str) -> tuple[Axes, ...]:
        """The labels of an array's dimensions; ``own`` ends with its depth."""
        heads = ("h", "g") if "g" in own else ("h",)
        middle = {"b": ("b",), "t": (own[0],), "hg": heads}
        return (*(middle[x] for x in LAYOUTS[layout]), (own[-1],))

    def _order(self, match: Match, layout: int, own: str) -> tuple[str, ...]:
        """Labels in the op's order, without dimensions of one element."""
        axes = self._axes(layout, own)
        return tuple(x for dim in axes for x in dim if match.sizes[x] != 1)

    def _shape(self, match: Match, layout: int, own: str) -> tuple[int, ...]:
        shape = []
        for dim in self._axes(layout, own):
            size = 1
            for x in dim:
                size *= match.sizes[x]
            shape.append(size)
        return tuple(shape)

    def _exact(self, match: Match, layout: int, own: str, array: Array) -> Name | None:
        """An array that is ``array`` as the op has it, where there is one."""
        order, shape = self._order(match, layout, own), self._shape(match, layout, own)
        for view in views(self.scopes, array):
            if view.labels == order:
                if self.scopes.value(view.name).shape == shape:
                    return view.name
                op = self.scopes.maker(view.name)
                if op is not None and op.kind == "reshape":
                    (read,) = self.scopes.reads(view.name, op)
                    if self.scopes.value(read).shape == shape:
                        return read
        return None

    def _arranged(
        self, match: Match, layout: int, own: str, array: Array, scope: int, at: int
    ) -> int:
        """An array as the op has it, in a scope, made before op ``at``."""
        exact = self._exact(match, layout, own, array)
        if exact is not None:
            return self._bring(scope, exact)
        value = self._bring(scope, array.name)
        held = self.scopes.value(array.name)
        order, shape = self._order(match, layout, own), self._shape(match, layout, own)
        turned = _turned(array, held.shape, order)
        value = self._transposed(scope, at, value, turned)
        return self._reshaped(scope, at, value, shape)

    def _result(self, match: Match, layout: int, own: str, part: Made) -> int:
        """The value that the op makes in place of a product's.

        Where that is rearranged right away as the op has it, and read by nobody else,
        it is what comes of that; else the product's is made of it.
        """
        program, edit = self.scopes.all[part.scope].program, self.edits[part.scope]
        result = program.ops[part.op].results[0]
        order, shape = self._order(match, layout, own), self._shape(match, layout, own)
        edit.gone.add(part.op)
        way = self._rearranged(part, order, shape)
        if way:
            edit.gone.update(way)
            return program.ops[way[-1]].results[0]
        target = program.values[result]
        turned = _turned(Array((part.scope, result), part.labels), target.shape, order)
        between = tuple(target.shape[d] for d in turned)
        back = tuple(turned.index(d) for d in range(len(turned)))
        made = edit.new(shape, target.dtype)
        value = self._reshaped(part.scope, part.op, made, between)
        params: dict[str, object] = {"permutation": back}
        self._emit(part.scope, part.op, "transpose", (value,), (result,), params)
        return made

    def _rearranged(
        self, part: Made, order: tuple[str, ...], shape: tuple[int, ...]
    ) -> list[int]:
        """The product and the ops after it, to the one that leaves its result as the
        attention op has it; [] where none does."""
        program, labels = self.scopes.all[part.scope].program, part.labels
        way = [part.op]
        while True:
            (value,) = program.ops[way[-1]].results
            held = program.values[value].shape
            if labels == order and held == shape:
                return way
            readers = program.uses.get(value, ())
            if len(readers) != 1 or value in program.outputs:
                return []
            op = program.ops[readers[0]]
            if op.kind not in SHAPES or op.kind == "broadcast_in_dim":
                return []
            way.append(readers[0])
            after = program.values[op.results[0]].shape
            if op.kind == "reshape" and labels == order and after == shape:
                return way
            to = moved(op, held, after)
            if to is None:
                return []
            back = {there: here for here, there in to.items()}
            labels = tuple(labels[back[place]] for place in range(len(back)))

    def _transposed(
        self, scope: int, at: int, value: int, order: tuple[int, ...]
    ) -> int:
        if order == tuple(range(len(order))):
            return value
        edit = self.edits[scope]
        was = edit.values[value]
        made = edit.new([was.shape[d] for d in order], was.dtype)
        params: dict[str, object] = {"permutation": order}
        self._emit(scope, at, "transpose", (value,), (made,), params)
        return made

    def _reshaped(self, scope: int, at: int, value: int, shape: tuple[int, ...]) -> int:
        edit = self.edits[scope]
        was = edit.values[value]
        if was.shape == shape:
            return value
        made = edit.new(shape, was.dtype)
        params = {"dimensions": None, "new_sizes": shape, "sharding": None}
        self._emit(scope, at, "reshape", (value,), (made,), params)
        return made

    # ---- between scopes --------------------------------------------------------------

    def _bring(self, scope: int, name: Name) -> int:
        """An array in a scope, handed in where it is not there."""
        if name[0] == scope:
            return name[1]
        if (scope, name) in self.inside:
            return self.inside[scope, name]
        here = self.scopes.all[scope]
        if here.parent < 0:
            raise Unreachable
        op = self.scopes.all[here.parent].program.ops[here.op]
        other = self.scopes.all[name[0]]
        held = self.edits[name[0]].values[name[1]]
        if held.literal is not None:
            edit = self.edits[scope]
            edit.values.append(held)
            return len(edit.values) - 1
        edit, outside = self.edits[scope], self.edits[here.parent]
        if op.kind == "scan" and other.parent == here.parent and other.op != here.op:
            given = self.scopes.all[here.parent].program.ops[other.op]
            length = op.param["length"]
            if given.kind != "scan" or given.param["length"] != length:
                raise Unreachable
            stack = self._stacked(name, length)
            value = edit.new(held.shape, held.dtype)
            edit.inputs["xs"].append((stack, value))
        elif op.kind in ("scan", "remat2"):
            outer = self._bring(here.parent, name)
            like = outside.values[outer]
            value = edit.new(like.shape, like.dtype)
            edit.inputs["consts"].append((outer, value))
        else:
            raise Unreachable
        self.inside[scope, name] = value
        return value

    def _stacked(self, name: Name, length: int) -> int:
        """The stack that a scan saves of a value of its body."""
        edit = self.edits[name[0]]
        for inner, stack in edit.outputs:
            if inner == name[1]:
                return stack
        scope = self.scopes.all[name[0]]
        held = edit.values[name[1]]
        stack = self.edits[scope.parent].new((length, *held.shape), held.dtype)
        edit.outputs.append((name[1], stack))
        return stack

    # ---- the Program -----------------------------------------------------------------

    def program(self) -> Program:
        return pruned(self._edited(0))

    def _edited(self, scope: int) -> Program:
        here, edit = self.scopes.all[scope], self.edits[scope]
        ops: list[Op] = []
        for index, op in enumerate(here.program.ops):
            ops += edit.before.get(index, ())
            if index in edit.gone:
                continue
            inside = self.scopes.inside.get((scope, index))
            ops.append(op if inside is None else self._called(op, inside))
        known = {*here.program.inputs, *(v for x in edit.inputs.values() for _, v in x)}
        known.update(i for i, v in enumerate(edit.values) if v.literal is not None)
        return replace(
            here.program, values=tuple(edit.values), ops=in_order(ops, known)
        )

    def _called(self, op: Op, inside: Sequence[int]) -> Op:
        """An op with its bodies edited, and what they are handed more."""
        bodies = [self._edited(inner) for inner in inside]
        edits = [self.edits[inner] for inner in inside]
        handed = any(e.outputs or any(e.inputs.values()) for e in edits)
        if not handed:
            return replace(op, programs=tuple(bodies))
        (body,), (edit,) = bodies, edits
        split = op.param.get("num_consts", len(op.operands))
        consts, xs = edit.inputs["consts"], edit.inputs["xs"]
        params = dict(op.params)
        if op.kind == "scan":
            params["num_consts"] = split + len(consts)

        def with_more(values: Sequence[int], which: int) -> tuple[int, ...]:
            more = [[pair[which] for pair in pairs] for pairs in (consts, xs)]
            return (*values[:split], *more[0], *values[split:], *more[1])

        body = replace(
            body,
            inputs=with_more(body.inputs, 1),
            outputs=(*body.outputs, *(inner for inner, _ in edit.outputs)),
        )
        return replace(
            op,
            operands=with_more(op.operands, 0),
            results=(*op.results, *(stack for _, stack in edit.outputs)),
            params=tuple(sorted(params.items())),
            programs=(body,),
        )


def _turned(
    array: Array, shape: tuple[int, ...], order: tuple[str, ...]
) -> tuple[int, ...]:
    """Dimensions in the order of their labels, behind those of one element."""
    at_place = {place: d for d, place in places(shape).items()}
    by_label = {x: at_place[i] for i, x in enumerate(array.labels)}
    short = [d for d, n in enumerate(shape) if n == 1]
    return (*short, *(by_label[x] for x in order))


def in_order(ops: Iterable[Op], known: Iterable[int]) -> tuple[Op, ...]:
    """Ops in the order given, but each behind those that make what it reads."""
    there = set(known)
    ordered: list[Op] = []
    waiting: dict[int, list[Op]] = {}

    def place(op: Op) -> None:
        pending = [op]
        while pending:
            one = pending.pop()
            missing = next((v for v in one.operands if v not in there), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(one)
                continue
            ordered.append(one)
            there.update(one.results)
            freed = [w for v in one.results for w in waiting.pop(v, ())]
            pending += reversed(freed)

    for op in ops:
        place(op)
    assert not waiting, "an op reads what is made of its own results"
    return tuple(ordered)
