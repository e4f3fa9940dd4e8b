"""Imports between the rooms of the package run one way; imports inside functions and by name count too."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssl_core"
LOOSE = {
    "config",
    "files",
    "progress",
    "provenance",
    "mistakes",
    "late_compiler",
    "terminal",
}  # modules that are in no room
# From the bottom up: a room imports itself and rooms of lower layers. Rooms of one layer do not import each other.
LAYERS = (
    LOOSE,
    {"experiments", "tracking"},
    {"networks", "data"},
    {"blocks"},
    {"methods"},
    {"training"},
    {"evaluations"},
    {"drawing"},
    {"report"},
    {"stages", "look", "inference"},
    {"cli", "ssl_core"},  # `ssl_core` is the package's own `__init__.py`
)
LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def module_name(path: Path) -> str:
    """Return the dotted name under which Python imports `path`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """Return the room of `module`, or its own name if it is in none."""
    return module.split(".")[1] if "." in module else module


@functools.cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(module: str) -> set[str]:
    """Return the modules of the package that `module` imports by a statement."""
    names = set()
    for node in ast.walk(syntax(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full, without leading dots"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                names.add(member if member in MODULES else str(node.module))
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


@functools.cache
def imports_by_name(module: str) -> set[str]:
    """Return the beginning of each name that `module` gives to `import_module`, up to its first variable part."""
    if module == "ssl_core.late_compiler":  # imports torch's modules by name
        return set()
    tree, names = syntax(module), set()
    constants = {
        statement.targets[0].id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            name = node.args[0]
            if isinstance(name, ast.Name):
                name = constants.get(name.id)
            if isinstance(name, ast.JoinedStr):
                name = name.values[0]
            text = name.value if isinstance(name, ast.Constant) else None
            assert isinstance(text, str), f"{module}: import_module needs a name that begins with a literal"
            names.add(text)
    return names


def targets(prefix: str) -> set[str]:
    """Return the modules of the package whose names begin with `prefix`."""
    return {module for module in MODULES if module.startswith(prefix)}


ANY_ROOM = "ssl_core."  # the beginning of a name whose room is a variable


def arrows(module: str) -> set[str]:
    """Return the modules that `module` imports by a statement or can import by name."""
    by_name = [targets(prefix) for prefix in imports_by_name(module) - {ANY_ROOM}]
    return imports(module).union(*by_name) - {module}


def reachable(start: str) -> set[str]:
    """Return all modules that importing `start` imports, directly or not."""
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(imports(module) if module in MODULES else ())
    return seen


def test_every_module_is_in_a_room_with_a_place_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE | {"cli", "__init__"}
    assert {room(module) for module in MODULES} == LAYER_OF.keys()


def is_allowed(importer: str, imported: str) -> bool:
    """Return whether a module of room `importer` may import one of room `imported`."""
    if importer == imported or {importer, imported} <= LOOSE:
        return True
    return LAYER_OF[imported] < LAYER_OF[importer]


@pytest.mark.parametrize("importer", sorted(LAYER_OF))
def test_arrows_run_one_way(importer: str):
    wrong = []
    for module in MODULES:
        if room(module) == importer:
            upwards = [target for target in arrows(module) if not is_allowed(importer, room(target))]
            wrong += [f"{module} -> {target}" for target in upwards]
    assert wrong == []


def test_only_the_top_imports_from_any_room():
    # The schema's generator imports the configurations of all methods and protocols.
    assert {room(module) for module in MODULES if ANY_ROOM in imports_by_name(module)} <= {"look"}


def test_no_circle_of_modules():
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


METHODS = sorted(targets("ssl_core.methods.") - {"ssl_core.methods.base"})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_method(method: str):
    assert arrows(method) & set(METHODS) == set()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_neither_the_loop_nor_the_loader(method: str):
    loader = {"ssl_core.data.loader", "ssl_core.data.pipeline"}
    assert reachable(method) & (loader | targets("ssl_core.training")) == set()


LIGHT = """
from ssl_core import provenance
from ssl_core.experiments import code

provenance.versions(), provenance.hardware(), code.stage_code("shard")
code.pretraining_code({"method": {"name": "ressl"}})
print(*{"torch", "mlflow", "nvidia.dali"} & set(sys.modules))
"""


def test_a_dry_run_and_sharding_import_no_torch():
    modules = ["ssl_core.config", "ssl_core.data.views", "ssl_core.stages.shard", *targets("ssl_core.experiments.")]
    program = f"import sys, {', '.join(modules)}\n{LIGHT}"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
