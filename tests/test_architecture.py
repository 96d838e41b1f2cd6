"""The laws of the house, read off the syntax trees of the package.

Nothing here imports the package: a room that does not exist yet is fine, a file that
is no room is not. Each law yields one line per breach, "path:line: what".
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = "rhino_jax"
ROOT = "__init__"  # the room of the package's own __init__.py
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80

BELOW_API = {
    "errors": "",
    "schedule": "errors",
    "options": "errors schedule",
    "ir": "errors",
    "rules": "errors ir",
    "extend": "errors rules",
    "compat": "errors",
    "trace": "errors ir rules compat",
    "cluster": "errors ir",
    "cost": "errors ir cluster",
    "sent": "errors ir cost rules",
    "plan": "errors ir cost rules sent",
    "search": "errors options ir rules cost cluster plan schedule",
    "lower": "errors options ir rules plan compat schedule",
    "verify": "errors plan ir compat cluster cost",
    "runtime": "errors options ir plan compat lower schedule",
    "profiling": "errors ir cluster compat verify",
    "report": "errors plan sent ir cost search schedule verify",
}
MAY_IMPORT = {room: set(rooms.split()) for room, rooms in BELOW_API.items()} | {
    "api": {*BELOW_API},
    "cli": {*BELOW_API, "api", ROOT},
    ROOT: {*BELOW_API, "api", "cli"},
}
WITHOUT_JAX = set(
    "ir rules extend cluster cost search sent plan report".split()
    + "options errors schedule".split()
)
JAX = {"jax", "jaxlib", "flax", "optax"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = {
    *("cli.py", "cli/launch.py"),
    *("runtime/job.py", "runtime/joining.py"),
    *("verify/child.py", "verify/compile_only.py"),
}
NO_FAMILY = {
    "rules": {"__init__", "notation", "registry", "stated", "window"},
    "lower/local": {"__init__", "collective_matmul", "halo", "shard", "registry"},
}


@dataclass(frozen=True)
class Module:
    """One file: its path inside the package, its dotted name, its text."""

    path: str
    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and absolute dotted name of all that is imported anywhere."""
        return list(imported(ast.walk(self.tree), self))

    @property
    def imports_on_load(self) -> list[tuple[int, str]]:
        """Those that run when the module is loaded."""
        return list(imported(loaded(self.tree), self))


def imported(nodes: Iterator[ast.AST], module: Module) -> Iterator[tuple[int, str]]:
    """Line and name of each; "from a import b" is a.b, module or not."""
    package = module.name.split(".")
    if not module.path.endswith("__init__.py"):
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def loaded(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on loading: no function bodies, nothing for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and for_types_only(child.test):
            for other in child.orelse:
                yield other
                yield from loaded(other)
            continue
        yield child
        yield from loaded(child)


def for_types_only(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def read(package: Path) -> list[Module]:
    modules = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        parts = [PACKAGE, *path.with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(path.as_posix(), name, file.read_text("utf-8")))
    return modules


def ours(name: str, modules: dict[str, Module]) -> Module | None:
    """The module an import reaches: a.b if that is one, else a; None if foreign."""
    if name.split(".")[0] != PACKAGE:
        return None
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return modules.get(name)


def jax_stays_out(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        exempt = module.path.startswith("cluster/profile")
        if module.room in WITHOUT_JAX and not exempt:
            for line, name in module.imports:
                if name.split(".")[0] in JAX:
                    yield f"{module.path}:{line}: imports {name}"


def rooms_import_upwards(modules: list[Module]) -> Iterator[str]:
    by_name = {module.name: module for module in modules}
    for module in modules:
        if module.room not in MAY_IMPORT:
            yield f"{module.path}:1: {module.room} is no room of the table"
            continue
        for line, name in module.imports:
            target = ours(name, by_name)
            if target and target.room not in MAY_IMPORT[module.room] | {module.room}:
                yield f"{module.path}:{line}: {module.room} imports {target.room}"


def no_import_cycles(modules: list[Module]) -> Iterator[str]:
    by_name = {module.name: module for module in modules}
    graph = {}
    for module in modules:
        targets = [ours(name, by_name) for _, name in module.imports_on_load]
        graph[module.path] = {target.path for target in targets if target}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
        yield f"{cycle[0]}:1: import cycle {' <- '.join(cycle)}"


def no_hidden_state(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.path}:{node.lineno}: global {', '.join(node.names)}"


def jax_private_in_compat(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room == "compat":
            continue
        for line, name in module.imports:
            if f"{name}.".startswith("jax._src."):
                yield f"{module.path}:{line}: uses {name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "_src":
                yield f"{module.path}:{node.lineno}: uses {ast.unparse(node)}"


def environment_at_the_doors(modules: list[Module]) -> Iterator[str]:
    names = {f"os.{name}" for name in ENVIRONMENT}
    for module in modules:
        if module.path in READS_ENVIRONMENT:
            continue
        for line, name in module.imports:
            if name in names:
                yield f"{module.path}:{line}: uses {name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
                yield f"{module.path}:{node.lineno}: uses {ast.unparse(node)}"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from "def" to the last, the docstring's left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def nothing_grows_too_long(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        lines = len(module.text.splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{module.path}:1: {lines} lines, over {MAX_FILE_LINES}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = function_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    yield (
                        f"{module.path}:{node.lineno}: {node.name} has {lines} lines,"
                        f" over {MAX_FUNCTION_LINES}"
                    )


def families_come_in_pairs(modules: list[Module]) -> Iterator[str]:
    """Every family of rules has its local computation, and the other way round."""
    paths = {module.path for module in modules}
    for folder, other in (("rules", "lower/local"), ("lower/local", "rules")):
        for path in sorted(paths):
            at, _, name = path.rpartition("/")
            if at != folder or name.removesuffix(".py") in NO_FAMILY[folder]:
                continue
            if f"{other}/{name}" not in paths:
                yield f"{path}:1: has no {other}/{name}"


Law = Callable[[list[Module]], Iterator[str]]
LAWS: list[Law] = [
    jax_stays_out,
    rooms_import_upwards,
    no_import_cycles,
    no_hidden_state,
    jax_private_in_compat,
    environment_at_the_doors,
    nothing_grows_too_long,
    families_come_in_pairs,
]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    modules = read(Path(__file__).parents[1] / PACKAGE)
    assert len(modules) > 1, "the package was not found"
    return modules


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps(law: Law, package: list[Module]) -> None:
    assert list(law(package)) == []


def test_the_table_has_no_cycle() -> None:
    """And names no room that has no row."""
    graph = {room: MAY_IMPORT[room] for room in [*BELOW_API, "api"]}
    assert {*graphlib.TopologicalSorter(graph).static_order()} == {*graph}


LONG = "def f():\n" + '    """Two\n    lines."""\n' + "    pass\n" * 79
PLANTS: list[tuple[Law, dict[str, str], list[str]]] = [
    (
        jax_stays_out,
        {
            "ir/a.py": "def f():\n    import jax.numpy as jnp\n",
            "plan.py": "from optax import adam\nimport jaxtyping\n",
            "cluster/profile_cpu.py": "import jax\n",
            "lower/a.py": "import jax\n",
        },
        ["ir/a.py:2: imports jax.numpy", "plan.py:1: imports optax.adam"],
    ),
    (
        rooms_import_upwards,
        {
            "__init__.py": "from rhino_jax.api import plan\n",
            "api.py": "import rhino_jax.cli\nfrom rhino_jax import plan, __all__\n",
            "cli.py": "from rhino_jax import api, __doc__\n",
            "plan.py": "def f():\n    from .search.a import g\n",
            "search/__init__.py": "",
            "search/a.py": "from rhino_jax import lower, plan\nfrom ..ir import b\n",
            "lower/__init__.py": "from . import c\n",
            "lower/c.py": "",
            "extra.py": "",
            "ir/__init__.py": "",
        },
        [
            "api.py:1: api imports cli",
            "api.py:2: api imports __init__",
            "extra.py:1: extra is no room of the table",
            "plan.py:2: plan imports search",
            "search/a.py:1: search imports lower",
        ],
    ),
    (
        no_import_cycles,
        {
            "ir/__init__.py": "from rhino_jax.ir.a import f\n",
            "ir/a.py": "try:\n    from rhino_jax.ir import g\nfinally:\n    pass\n",
        },
        ["ir/__init__.py:1: import cycle ir/__init__.py <- ir/a.py <- ir/__init__.py"],
    ),
    (
        no_import_cycles,
        {
            "ir/a.py": "if TYPE_CHECKING:\n    from . import b\nelse:\n    pass\n",
            "ir/b.py": "from . import c\n",
            "ir/c.py": "def f():\n    from rhino_jax.ir import b\n",
        },
        [],
    ),
    (
        no_hidden_state,
        {"ir/a.py": "X = 1\ndef f():\n    global X\n    X = 2\n"},
        ["ir/a.py:3: global X"],
    ),
    (
        jax_private_in_compat,
        {
            "compat.py": "from jax._src import core\n",
            "lower/a.py": "from jax._src import core\nfrom jax import _src\n",
            "lower/b.py": "import jax as j\n\nx = j._src.core\n",
        },
        [
            "lower/a.py:1: uses jax._src.core",
            "lower/a.py:2: uses jax._src",
            "lower/b.py:3: uses j._src",
        ],
    ),
    (
        environment_at_the_doors,
        {
            "cli.py": "import os\nx = os.environ\n",
            "verify/child.py": "from os import environ\n",
            "verify/a.py": "from os import environ\n",
            "search/a.py": "import os\nx = os.environ['X']\ny = os.getenv('Y')\n",
        },
        [
            "search/a.py:2: uses os.environ",
            "search/a.py:3: uses os.getenv",
            "verify/a.py:1: uses os.environ",
        ],
    ),
    (
        nothing_grows_too_long,
        {
            "ir/a.py": "#\n" * 500,
            "ir/b.py": "#\n" * 501,
            "ir/c.py": LONG,
            "ir/d.py": LONG + "    pass\n",
        },
        ["ir/b.py:1: 501 lines, over 500", "ir/d.py:1: f has 81 lines, over 80"],
    ),
    (
        families_come_in_pairs,
        dict.fromkeys(
            [
                *("rules/__init__.py", "rules/notation.py", "rules/shape.py"),
                *("rules/sorting.py", "lower/local/shape.py", "lower/local/shard.py"),
                *("lower/local/random.py", "lower/manual.py"),
            ],
            "",
        ),
        [
            "rules/sorting.py:1: has no lower/local/sorting.py",
            "lower/local/random.py:1: has no rules/random.py",
        ],
    ),
]


def test_every_law_has_a_planted_breach() -> None:
    assert {law for law, _, breaches in PLANTS if breaches} == {*LAWS}


@pytest.mark.parametrize(("law", "files", "breaches"), PLANTS)
def test_a_planted_breach_is_found(
    law: Law, files: dict[str, str], breaches: list[str], tmp_path: Path
) -> None:
    for path, text in files.items():
        file = tmp_path / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    assert list(law(read(tmp_path / PACKAGE))) == breaches
