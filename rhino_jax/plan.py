"""The answer: a frozen value that knows no JAX. It saves, loads and compares itself.

A plan says everything that the lowered program will do: the layout of every input and
output, the choice of every op, every collective with its bytes. It is made for one
Program (its digest is kept) and, with that Program, lowers without any search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rhino_jax.errors import PlanFileError, problems
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.data import assignment_data, assignment_of
from rhino_jax.ir.layout import Layout, parse_layout
from rhino_jax.ir.mesh import STAGE, Axis, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.spans import checked, numbers
from rhino_jax.sent import Collective, collectives

FORMAT = "rhino-plan"
VERSION = 4


@dataclass(frozen=True)
class Leaf:
    """One array that goes in or comes out: its tree path, shape, dtype and layout."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout

    def __str__(self) -> str:
        return f"{self.path}: {self.dtype}{list(self.shape)} {self.layout}"


@dataclass(frozen=True)
class Predicted:
    """What one step of a plan is predicted to cost, on one device.

    ``step_seconds`` is compute and communication one after the other.
    ``limit_bytes`` is what ``peak_bytes``, with gaps between buffers, had to stay
    within; ``flops`` are those of
    matrix products and convolutions. ``byte_seconds`` is what the search would pay for
    a byte less in memory; 0 where memory was no concern.
    """

    step_seconds: float
    compute_seconds: float
    comm_seconds: float
    peak_bytes: int
    limit_bytes: int
    flops: float = 0.0
    byte_seconds: float = 0.0


@dataclass(frozen=True)
class Stages:
    """How a pipeline is cut, and in what order its stages run.

    ``segments`` of every stage, as :mod:`rhino_jax.ir.spans` writes them; ``schedule``
    by name. Stage s is run by worker ``s % num_workers``, each on a mesh of its own.
    """

    segments: tuple[str, ...]
    schedule: str
    num_workers: int

    def __post_init__(self) -> None:
        held = [n for text in self.segments for n in numbers(text)]
        assert sorted(held) == list(range(len(held))), f"segments {self.segments}"
        assert 0 < self.num_workers <= len(self.segments), f"{self.num_workers} workers"
        assert len(self.segments) % self.num_workers == 0, f"{self.num_workers} workers"

    @property
    def per_worker(self) -> int:
        return len(self.segments) // self.num_workers

    def __str__(self) -> str:
        each = f" ({self.per_worker} a worker)" if self.per_worker > 1 else ""
        return f"{len(self.segments)} stages{each}, {self.schedule}"


@dataclass(frozen=True)
class Plan:
    """How one Program runs on one mesh.

    ``stages`` says how it is a pipeline, where it is one: ``mesh`` is then that of each
    worker. ``microbatches`` is the size of the time axis, ``remat`` are pairs of
    segments ("*", or as :mod:`rhino_jax.ir.spans` writes them) and policy.
    ``attention`` is "recognized" where the plan is of the Program with its attention
    recognized (:mod:`rhino_jax.search.recognize`), before anything is rematerialized.
    ``made_with`` names the versions that made the plan.
    """

    mesh: Mesh
    program_name: str
    program_digest: str
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    assignment: Assignment
    collectives: tuple[Collective, ...]
    recipe: str = ""
    lowering: str = "manual"
    microbatches: int = 1
    stages: Stages | None = None
    remat: tuple[tuple[str, str], ...] = ()
    cluster: str = ""
    notes: tuple[str, ...] = ()
    made_with: tuple[tuple[str, str], ...] = ()
    ops: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    predicted: Predicted | None = None
    attention: str = ""

    @property
    def num_devices(self) -> int:
        """Devices of the mesh, of all workers' meshes where it is a pipeline."""
        return self.whole_mesh.num_devices

    @property
    def whole_mesh(self) -> Mesh:
        """The mesh with a leading axis over the workers, where it is a pipeline."""
        if self.stages is None:
            return self.mesh
        return Mesh((Axis(STAGE, self.num_workers), *self.mesh.axes))

    @property
    def num_workers(self) -> int:
        """Shares of the devices that run stages side by side; 1 for no pipeline."""
        return self.stages.num_workers if self.stages else 1

    @property
    def wire_bytes(self) -> int:
        """Bytes each device sends in one step; of a pipeline, one of every worker's
        together, without what goes from stage to stage."""
        return sum(c.total_bytes for c in self.collectives)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, with a checksum."""
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """The plan as JSON text: the same bytes for the same plan."""
        body = _to_data(self)
        digest = hashlib.sha256(_dump(body).encode()).hexdigest()
        head = {"format": FORMAT, "version": VERSION, "sha256": digest}
        return json.dumps({**head, "plan": body}, indent=1)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanFileError: the file is missing, damaged, or no plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"{path}: {error}; save the plan again") from error
        return Plan.from_json(text, str(path))

    @staticmethod
    def from_json(text: str, name: str = "plan") -> Plan:
        """The inverse of :meth:`to_json`. Raises :class:`PlanFileError`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanFileError(f"{name}: not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanFileError(f"{name}: this is no Rhino plan (no format {FORMAT!r})")
        if data.get("version") != VERSION:
            raise PlanFileError(
                f"{name}: plan format {data.get('version')}, this Rhino reads "
                f"{VERSION}; plan again and save"
            )
        body = data.get("plan")
        found = hashlib.sha256(_dump(body).encode()).hexdigest()
        if found != data.get("sha256"):
            raise PlanFileError(
                f"{name}: damaged: sha256 {found[:12]}, the file says "
                f"{str(data.get('sha256'))[:12]}; plan again and save"
            )
        try:
            return _from_data(body)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise PlanFileError(f"{name}: not readable as a plan: {error}") from error

    def fits(self, program: Program) -> None:
        """Check that this is the plan of ``program``.

        Raises:
            PlanFileError: it was made for another Program; says what differs first.
        """
        if program.digest == self.program_digest:
            return
        found = []
        if len(program.inputs) != len(self.inputs):
            found.append(f"{len(program.inputs)} inputs, planned {len(self.inputs)}")
        for leaf, value in zip(self.inputs, program.inputs, strict=False):
            v = program.values[value]
            if (v.shape, v.dtype) != (leaf.shape, leaf.dtype):
                found.append(
                    f"input {leaf.path} is {v.dtype}{list(v.shape)}, "
                    f"planned {leaf.dtype}{list(leaf.shape)}"
                )
        kinds = [(op.where.name_stack, op.kind) for op in program.ops]
        for index, (now, then) in enumerate(zip(kinds, self._kinds(), strict=False)):
            if now[1] != then:
                found.append(f"op {index} is {now[1]}, planned {then}")
                break
        if len(kinds) != len(self.assignment.ops):
            found.append(f"{len(kinds)} ops, planned {len(self.assignment.ops)}")
        versions = ", ".join(f"{k} {v}" for k, v in self.made_with)
        raise PlanFileError(
            problems(
                f"this plan was made for another program ({self.program_name!r}, "
                f"{versions}):",
                found[:8] or ["the ops' parameters differ"],
                "Another JAX version may trace other ops; layouts of parameters "
                "survive as pins: plan again with pins=plan.pins().",
            )
        )

    def _kinds(self) -> Iterator[str]:
        for name, _ in self.ops:
            yield name.rsplit("@", 1)[-1]

    def pins(self) -> dict[str, tuple[Any, ...]]:
        """The layouts of inputs, as tuples that a PartitionSpec can be made of."""
        return {
            leaf.path: tuple(
                tuple(s.axis for s in dim) or None for dim in leaf.layout.dims
            )
            for leaf in self.inputs
        }

    def diff(self, other: Plan) -> tuple[str, ...]:
        """What ``other`` does otherwise, one line each; empty where nothing."""
        lines = []
        if self.mesh != other.mesh:
            lines.append(f"mesh: {self.mesh} -> {other.mesh}")
        if self.stages != other.stages:
            lines.append(f"stages: {self.stages or 1} -> {other.stages or 1}")
        if self.program_digest != other.program_digest:
            lines.append(f"program: {self.program_name} -> {other.program_name}")
        for what, mine, theirs in (
            ("input", self.inputs, other.inputs),
            ("output", self.outputs, other.outputs),
        ):
            then = {leaf.path: leaf for leaf in mine}
            now = {leaf.path: leaf for leaf in theirs}
            for path in dict.fromkeys((*then, *now)):
                a, b = then.get(path), now.get(path)
                if a != b:
                    old = a.layout if a else "absent"
                    lines.append(
                        f"{what} {path}: {old} -> {b.layout if b else 'absent'}"
                    )
        if self.program_digest == other.program_digest:
            changed = sum(
                a != b
                for a, b in zip(self.assignment.ops, other.assignment.ops, strict=True)
            )
            if changed:
                lines.append(f"{changed} of {len(self.assignment.ops)} ops change")
        if self.wire_bytes != other.wire_bytes:
            lines.append(f"bytes sent: {self.wire_bytes} -> {other.wire_bytes}")
        return tuple(lines)


def make_plan(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    input_paths: tuple[str, ...],
    output_paths: tuple[str, ...],
    **more: Any,
) -> Plan:
    """A Plan from an assignment: its leaves and its collectives."""
    consts = len(program.inputs) - len(input_paths)
    names = (*input_paths, *(f"constant {i}" for i in range(consts)))

    def leaves(
        values: tuple[int, ...], paths: tuple[str, ...], layouts: tuple[Layout, ...]
    ) -> tuple[Leaf, ...]:
        return tuple(
            Leaf(path, program.values[v].shape, program.values[v].dtype, layout)
            for v, path, layout in zip(values, paths, layouts, strict=True)
        )

    return Plan(
        mesh,
        program.name,
        program.digest,
        leaves(program.inputs, names, assignment.inputs),
        leaves(program.outputs, output_paths, assignment.outputs),
        assignment,
        tuple(collectives(program, assignment, mesh)),
        ops=tuple(op_keys(program)),
        **more,
    )


def op_keys(program: Program) -> Iterator[tuple[str, int]]:
    """("name stack@kind", how many of that name came before) for every op."""
    seen: dict[str, int] = {}
    for op in program.ops:
        name = f"{op.where.name_stack}@{op.kind}"
        seen[name] = seen.get(name, -1) + 1
        yield name, seen[name]


# ---- JSON -------------------------------------------------------------------------


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _to_data(plan: Plan) -> dict[str, Any]:
    return {
        "mesh": [[a.name, a.size, a.link] for a in plan.mesh.axes],
        "program": {"name": plan.program_name, "digest": plan.program_digest},
        "inputs": [_leaf_data(leaf) for leaf in plan.inputs],
        "outputs": [_leaf_data(leaf) for leaf in plan.outputs],
        "recipe": plan.recipe,
        "lowering": plan.lowering,
        "microbatches": plan.microbatches,
        "stages": _stages_data(plan.stages),
        "remat": [list(pair) for pair in plan.remat],
        "attention": plan.attention,
        "cluster": plan.cluster,
        "notes": list(plan.notes),
        "made_with": [list(pair) for pair in plan.made_with],
        "predicted": asdict(plan.predicted) if plan.predicted else None,
        "collectives": [_collective_data(c) for c in plan.collectives],
        "op_keys": [list(key) for key in plan.ops],
        "assignment": assignment_data(plan.assignment),
    }


def _from_data(data: Any) -> Plan:
    return Plan(
        Mesh(tuple(Axis(name, size, link) for name, size, link in data["mesh"])),
        data["program"]["name"],
        data["program"]["digest"],
        tuple(_leaf(x) for x in data["inputs"]),
        tuple(_leaf(x) for x in data["outputs"]),
        assignment_of(data["assignment"]),
        tuple(_collective(c) for c in data["collectives"]),
        data["recipe"],
        data["lowering"],
        data["microbatches"],
        _stages(data["stages"]),
        tuple((checked(a), b) for a, b in data["remat"]),
        data["cluster"],
        tuple(data["notes"]),
        tuple((a, b) for a, b in data["made_with"]),
        tuple((name, index) for name, index in data["op_keys"]),
        Predicted(**data["predicted"]) if data["predicted"] else None,
        data.get("attention", ""),
    )


def _stages_data(stages: Stages | None) -> dict[str, Any] | None:
    if stages is None:
        return None
    return {**asdict(stages), "segments": list(stages.segments)}


def _stages(data: Any) -> Stages | None:
    if data is None:
        return None
    held = tuple(checked(text) for text in data["segments"])
    return Stages(held, data["schedule"], data["num_workers"])


def _leaf_data(leaf: Leaf) -> list[Any]:
    return [leaf.path, list(leaf.shape), leaf.dtype, str(leaf.layout)]


def _leaf(data: Any) -> Leaf:
    path, shape, dtype, layout = data
    return Leaf(path, tuple(shape), dtype, parse_layout(layout))


def _collective_data(c: Collective) -> list[Any]:
    return [
        c.kind,
        list(c.axes),
        c.wire_bytes,
        c.count,
        c.dtype,
        list(c.shape),
        c.where,
        c.phase,
    ]


def _collective(data: Any) -> Collective:
    kind, axes, sent, count, dtype, shape, where, phase = data
    return Collective(kind, tuple(axes), sent, count, dtype, tuple(shape), where, phase)
