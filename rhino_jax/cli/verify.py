"""``rhino verify``: a user's step under a plan, and what the real compiler makes of it.

A saved plan holds no program, so the step itself is named: a function that returns it
and its arguments, as arrays or shapes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import rhino_jax as rhino
from rhino_jax.errors import OptionsError, nearest

EXAMPLE = "train.py:make_step"


@click.command()
@click.argument("step", metavar="MODULE:FUNCTION")
@click.option(
    "--cluster",
    default="",
    help='Hardware to compile for, such as "h100:2x8"; no such device is needed. '
    "Default: that of --plan.",
)
@click.option(
    "--plan",
    "plan_file",
    default="",
    type=click.Path(dir_okay=False),
    help="A saved plan of this step; default: one is searched.",
)
@click.option("--recipe", default="", help="A known plan, such as zero3.")
@click.option(
    "--timeout", default=600.0, show_default=True, help="Seconds for the compiler."
)
def verify(
    step: str, cluster: str, plan_file: str, recipe: str, timeout: float
) -> None:
    """Compile a planned step with the real compiler; compare it with the plan.

    MODULE:FUNCTION, such as train.py:make_step or package.train:make_step, is a
    function without arguments that returns the train step and then its arguments
    (arrays or jax.ShapeDtypeStruct): `return train_step, state, batch`.

    Exits with 1 where the compiled program is not the plan, or does not fit.
    """
    if not cluster and not plan_file:
        raise OptionsError(
            "rhino verify needs hardware to compile for: --cluster h100:2x8, or a "
            "saved plan that names it: --plan plan.json"
        )
    given = load(step)()
    if not isinstance(given, tuple) or not given or not callable(given[0]):
        raise OptionsError(
            f"{step} must return (train_step, *arguments), it returned "
            f"{type(given).__name__}; next: return train_step, state, batch"
        )
    fun, *args = given
    options: dict[str, Any] = {"cluster": cluster} if cluster else {}
    if plan_file:
        options["plan"] = rhino.Plan.load(plan_file)
    if recipe:
        options["recipe"] = recipe
    planned = rhino.plan(fun, *args, **options)
    found = planned.verify(timeout_seconds=timeout)
    click.echo(str(found))
    if not found.ok:
        sys.exit(1)


def load(name: str) -> Callable[[], Any]:
    """The function that ``name`` ("file.py:function", "module:function") names.

    Raises:
        OptionsError: no such file, module or function (nearest names).
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise OptionsError(f"{name!r}: write module:function, such as {EXAMPLE}")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        close = nearest(function, known)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise OptionsError(f"{place} has no function {function!r}{hint}")
    result: Callable[[], Any] = found
    return result


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OptionsError(f"{path}: no such file; next: {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, "")  # as ``python -m`` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OptionsError(
            f"no module {name!r} ({error}); next: a file, such as {EXAMPLE}"
        ) from error
