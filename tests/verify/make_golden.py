"""Writes the HLO snippets in data/: ``python -m tests.verify.make_golden``.

Each is a program of programs.py compiled by a real compiler and trimmed to what the
reader looks at. Run it after a new JAX release and read the difference.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rhino_jax.verify.compile_only import compile_for
from rhino_jax.verify.hlo import HloCollective, read
from rhino_jax.verify.hlo_text import (
    Computation,
    HloModule,
    Instruction,
    parse_module,
)
from rhino_jax.verify.targets import parse_target
from tests.verify import programs

DATA = Path(__file__).parent / "data"
TARGETS = {"cpu": "cpu:8", "h100": "h100:1x8", "v5e": "v5e:2x4", "tpu7x": "tpu7x:2x2x1"}
GOLDEN = {
    "cpu": ("mixed", "nested", "zero", "branches", "exchange", "constrained"),
    "h100": ("mixed", "nested", "zero", "many", "endless", "constrained"),
    "v5e": ("mixed", "nested", "zero", "padded", "endless", "constrained", "exchange"),
    "tpu7x": ("zero",),
}
_CONFIG = re.compile(
    r'"known_trip_count":\{[^}]*\}|"async_collective_fusion_config":\{[^}]*\}'
    r'|"emitter":"\w+"'
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def trim(text: str) -> str:
    """Leave out what no reader looks at; what is read stays the same."""
    module = parse_module(text)
    busy = _busy(module)
    kept: dict[str, list[str]] = {}
    for name, one in module.computations.items():
        kept[name] = _needed(module, one, name in busy or name == module.entry)
    used = "".join(line for lines in kept.values() for line in lines)
    called = {*re.findall(r"%([\w.\-]+)", used), module.entry}
    head = re.search(r"num_partitions=\d+", text)
    out = [f"HloModule {text.split()[1]} {head.group() if head else ''}".rstrip()]
    out += _tables(text, {int(n) for n in re.findall(r"stack_frame_id=(\d+)", used)})
    for name, lines in kept.items():
        if name in called:
            entry = "ENTRY " if name == module.entry else ""
            out += ["", f"{entry}%{name} () -> () {{", *lines, "}"]
    return "\n".join(out) + "\n"


def _busy(module: HloModule) -> set[str]:
    """The computations that hold a collective or call one that does."""
    calls = {
        name: {
            other
            for line in one.instructions.values()
            for other in re.findall(r"%([\w.\-]+)", line.rest)
        }
        for name, one in module.computations.items()
    }
    busy = {
        name
        for name, one in module.computations.items()
        if any(_COLLECTIVE.match(line.opcode) for line in one.instructions.values())
    }
    for _ in calls:
        busy |= {name for name, others in calls.items() if others & busy}
    return busy


_COLLECTIVE = re.compile(r"all-|reduce-scatter|collective-|ragged-|(call|async)-start")


def _needed(module: HloModule, inside: Computation, busy: bool) -> list[str]:
    """The kept lines: what moves data between devices, counters, the root."""
    found = {inside.root}
    if inside.instructions[inside.root].type_text.startswith(("s32[]", "pred[]")):
        found |= set(inside.instructions)
    for one in inside.instructions.values():
        counter = one.type_text.startswith(("s32[]", "pred[]"))
        runs = busy and one.opcode in ("while", "conditional", "dynamic-slice", "tuple")
        held = set(re.findall(r"%([\w.\-]+)", one.rest)) & _busy(module)
        if counter or runs or held or _COLLECTIVE.match(one.opcode):
            found.add(one.name)
            found |= set(() if one.opcode == "tuple" else one.operands)
    found |= {
        operand
        for one in inside.instructions.values()
        if one.opcode in ("get-tuple-element", "slice", "pad") and one.name in found
        for operand in one.operands
    }
    return [
        _short(one, name == inside.root)
        for name, one in inside.instructions.items()
        if name in found
    ]


def _short(one: Instruction, root: bool) -> str:
    """A line without its backend configuration, but for what is read of it."""
    body, _, config = one.rest.partition(", backend_config=")
    reducer = root and one.type_text.startswith("f32[]")
    if not (_COLLECTIVE.match(one.opcode) or "all-reduce" in body or reducer):
        body = re.sub(r", metadata=\{[^}]*\}|, sharding=\{[^}]*\}", "", body)
    settings = _CONFIG.findall(config)
    kept = f", backend_config={{{','.join(settings)}}}" if settings else ""
    start = f"  {'ROOT ' if root else ''}%{one.name} = {one.type_text} {one.opcode}"
    return f"{start}({one.operand_text}){body}{kept}"


def _tables(text: str, frames: set[int]) -> list[str]:
    """The source tables, with the frames that are left; files by their last name."""
    lines = text.splitlines()
    out: list[str] = []
    table = ""
    for line in lines[1:]:
        if line in _TABLES:
            table = line
            out += ["", line] if line != "FunctionNames" else []
        elif found := re.match(r"(\d+) (.*)", line):
            number, body = int(found.group(1)), found.group(2)
            if table == "FileNames":
                out.append(f'{number} "{Path(body.strip(chr(34))).name}"')
            elif table == "FileLocations" or (
                table == "StackFrames" and number in frames
            ):
                out.append(line)
        elif line.startswith(("%", "ENTRY")):
            break
    return out


def main() -> None:
    """Compile and write every snippet."""
    for where, names in GOLDEN.items():
        target = parse_target(TARGETS[where])
        for name in names:
            if name == "constrained":
                lowered = programs.lower_constrained(target.platform)
            else:
                lowered = programs.lower(name, target.platform)
            facts = compile_for(lowered, target, cache_dir=None)
            assert facts.ok, facts.message
            short = trim(facts.hlo)
            assert _read(short) == _read(facts.hlo), f"{where} {name}: trimmed too much"
            (DATA / f"{where}_{name}.hlo").write_text(short)


def _read(text: str) -> list[HloCollective]:
    """What the reader reads, files by their last name, without lines nearby."""
    found = read(text)
    lines = [re.sub(r"\S*/(?=\w+\.py)|^near .*", "", one.source) for one in found]
    return [replace(one, source=line) for one, line in zip(found, lines, strict=True)]


if __name__ == "__main__":
    main()
