"""Programs as stable text, one op a line."""

from __future__ import annotations

from rhino_jax.ir.program import Op, Program

_QUIET = {"sharding", "out_sharding", "preferred_element_type", "jaxpr", "name"}


def print_program(program: Program, indent: str = "", where: bool = False) -> str:
    """The whole Program as text.

    >>> from rhino_jax.ir.program import Op, Program, Value
    >>> f = Value((2,), "float32")
    >>> print(print_program(Program((f, f), (0,), (Op("exp", (0,), (1,)),), (1,))))
    step(%0: f32[2]) {
      %1: f32[2] = exp %0
      return %1
    }
    """
    ins = ", ".join(f"%{v}: {program.values[v]}" for v in program.inputs)
    lines = [f"{indent}{program.name}({ins}) {{"]
    for op in program.ops:
        lines.append(f"{indent}  {print_op(program, op, where)}")
        for inner in (*op.programs, *([op.local] if op.local else [])):
            lines.append(print_program(inner, indent + "    ", where))
    outs = ", ".join(_operand(program, v) for v in program.outputs)
    lines += [f"{indent}  return {outs}", f"{indent}}}"]
    return "\n".join(lines)


def print_op(program: Program, op: Op, where: bool = False) -> str:
    """One op as one line; its nested Programs are left to the caller."""
    results = ", ".join(f"%{v}: {program.values[v]}" for v in op.results)
    operands = ", ".join(_operand(program, v) for v in op.operands)
    params = " ".join(
        f"{key}={_plain(value)}"
        for key, value in op.params
        if key not in _QUIET and value not in (None, (), False)
    )
    text = f"{results} = {op.kind} {operands}" if results else f"{op.kind} {operands}"
    if params:
        text += f" [{params}]"
    if where and str(op.where):
        text += f"  # {op.where}"
    return text


def _operand(program: Program, value: int) -> str:
    literal = program.values[value].literal
    return f"%{value}" if literal is None else f"{literal}"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(_plain(v) for v in value) + ")"
    return str(value)
