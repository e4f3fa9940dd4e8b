"""The definitions of the package (functions, classes, constants), each reduced to its meaning. Torch-free.

Left out are comments, docstrings, type hints, imports, messages, and the names of modules, of definitions and of local
variables. `code.py` follows the references from one definition to others.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ssl_core.provenance import canonical, file_digest

PACKAGE = Path(__file__).parents[1]
# These modules watch, store or start a run. They never change a number, so the search ends at them.
OUTSIDE = (
    "tracking",
    "experiments",
    "cli",
    "files",
    "progress",
    "provenance",
    "mistakes",
    "late_compiler",
    "stages.nodes",
    "stages.ranks",
)
SPOKEN = {"print", "warnings.warn", "tqdm.tqdm.write", "tqdm.write"}  # calls that only inform a person
PROSE = re.compile(r"[A-Za-z]{2,}[,;:]? [A-Za-z]{2,}")  # a text of several words is for people, too
SETTINGS = ("ssl_core.config", "Strict")  # base class of all sections of the configuration
IMPORTS = (ast.Import, ast.ImportFrom)
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NESTED = (*SCOPES, ast.ClassDef)
SKIPPED = frozenset(("ctx", "kind", "type_comment", "annotation", "returns"))


class Key(NamedTuple):
    """A definition: a name of a module, or one entry of a table, or one field of a section (`part`)."""

    module: str
    name: str
    part: str = ""


@dataclass
class Meaning:
    """A definition reduced to what it does."""

    shape: str  # the syntax tree with "@" in place of each reference to another definition
    references: list[Key] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # string constants
    attributes: set[str] = field(default_factory=set)  # names behind a dot


@cache
def meaning_of(key: Key) -> Meaning:
    """Reduce one definition; the empty name is a module's statements that define nothing."""
    module = module_of(key.module)
    if not key.name:
        nodes: list[ast.AST] = [*module.effects]
    elif key.part:
        parts: Mapping[str, ast.AST] = module.tables.get(key.name) or fields_of(Key(key.module, key.name))
        nodes = [parts[key.part]] if key.part in parts else []
    elif key.name in module.definitions:
        nodes = [*module.definitions[key.name]]
    else:
        nodes = []
    if key.name and not nodes:
        raise ValueError(f"{key.module} defines no {'.'.join(filter(None, key[1:]))}")
    reducer = _Reducer(module, key)
    shape = [reducer.dump(node) for node in nodes]
    shape += [f"{name} {file_digest(path)}" for name, path in _files_beside(key.module, reducer.texts)]
    return Meaning(canonical(shape), reducer.references, reducer.texts, reducer.attributes)


@dataclass
class Module:
    """The top level of one file."""

    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    tables: dict[str, dict[str, ast.expr]] = field(default_factory=dict)  # dictionaries with texts as keys
    imports: dict[str, str] = field(default_factory=dict)  # name -> "package.module" or "package.module.name"
    effects: list[ast.stmt] = field(default_factory=list)


@cache
def module_of(name: str) -> Module:
    path = source_of(name)
    if path is None:
        raise ValueError(f"the package has no module {name}")
    module = Module(name)
    for statement in ast.parse(path.read_bytes(), filename=str(path)).body:
        if isinstance(statement, IMPORTS):
            module.imports |= _imported(statement)
            continue
        names = sorted(_stored(statement))
        for bound in names:
            module.definitions.setdefault(bound, []).append(statement)
        if not names and not _is_text(statement):
            module.effects.append(statement)
        value = getattr(statement, "value", None)
        if len(names) == 1 and isinstance(value, ast.Dict) and _has_text_keys(value):
            module.tables[names[0]] = _entries(value)
    return module


def _has_text_keys(table: ast.Dict) -> bool:
    return bool(table.keys) and all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in table.keys)


def _entries(table: ast.Dict) -> dict[str, ast.expr]:
    keys = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    return dict(zip(keys, table.values, strict=True))  # pyright: ignore[reportReturnType]


@cache
def source_of(module: str) -> Path | None:
    """Find the file of a module of the package; None for what is no module or not ours."""
    top, *parts = module.split(".")
    if top != PACKAGE.name:
        return None
    stem = PACKAGE.joinpath(*parts)
    candidates = (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def _files_beside(module: str, texts: set[str]) -> list[tuple[str, Path]]:
    """List the files, such as templates, that a definition names and that lie beside its module."""
    folder = (source_of(module) or PACKAGE).parent
    names = sorted(text for text in texts if re.fullmatch(r"\w+\.(html|css|j2)", text))
    return [(name, folder / name) for name in names if (folder / name).is_file()]


def is_outside(module: str, drawing: bool = True) -> bool:
    """Return whether the search ends at a module; without `drawing` it also ends at the pictures."""
    room, _, name = module.partition(".")[2].partition(".")
    return room in OUTSIDE or f"{room}.{name}" in OUTSIDE or (room == "drawing" and not drawing)


@cache
def ancestors(key: Key) -> frozenset[Key]:
    """Return a class of the package and all its bases in the package."""
    found = {key}
    for node in module_of(key.module).definitions.get(key.name, []):
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            target = _Reducer(module_of(key.module), key).resolve(base)
            if isinstance(target, Key) and target != key:
                found |= ancestors(target)
    return frozenset(found)


@cache
def fields_of(key: Key) -> dict[str, ast.stmt]:
    """Return the fields of a section of the configuration by name; none for other definitions."""
    node = module_of(key.module).definitions.get(key.name, [None])[0]
    if not isinstance(node, ast.ClassDef) or Key(*SETTINGS) not in ancestors(key):
        return {}
    annotated = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    return {one.target.id: one for one in annotated if isinstance(one.target, ast.Name)}


class _Reducer:
    """Writes a definition down without what does not count, and collects what it refers to."""

    def __init__(self, module: Module, key: Key) -> None:
        self.module, self.key = module, key
        self.references: list[Key] = []
        self.texts: set[str] = set()
        self.attributes: set[str] = set()
        self.scopes: list[dict[str, str]] = []  # local name -> number, "=parameter" or ">import"; innermost last
        self.in_class = False
        self.numbers = 0

    def dump(self, node: Any) -> Any:
        """Write a node as nested lists of texts."""
        if isinstance(node, list):
            return [self.dump(item) for item in node if not self._is_dropped(item)]
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, SCOPES):
            return self._scope(node)
        if isinstance(node, ast.ClassDef):
            return self._class(node)
        special = getattr(self, f"_{type(node).__name__.lower()}", None)
        return self._plain(node) if special is None else special(node)

    def resolve(self, node: ast.AST) -> "Key | str | None":
        """Return what a name or a chain of attributes refers to: a definition, a module or a foreign name."""
        if isinstance(node, ast.Name):
            return self._resolve_name(node.id)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            return _member(base, node.attr) if isinstance(base, str) else None
        return None

    def _resolve_name(self, name: str) -> "Key | str | None":
        at_module = name in self.module.definitions or name in self.module.imports
        for scope in reversed(self.scopes):
            if name in scope and not (self.in_class and at_module):
                return _target(scope[name][1:]) if scope[name].startswith(">") else None
        if name in self.module.definitions:
            return Key(self.module.name, name)
        return _target(self.module.imports[name]) if name in self.module.imports else None

    def _is_dropped(self, node: Any) -> bool:
        if isinstance(node, (*IMPORTS, ast.Pass)) or _is_text(node):
            return True
        if isinstance(node, ast.AnnAssign) and node.value is None and not self.in_class:
            return True
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return self._is_spoken(node.value)
        return isinstance(node, ast.keyword) and node.arg == "description"

    def _is_spoken(self, call: ast.Call) -> bool:
        """Recognise a call that informs a person and whose text is no result of a function of the package."""
        inner = (node for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Call))
        works = any(isinstance(self.resolve(node.func), Key) for node in inner)
        return _dotted(self.resolve(call.func), call.func) in SPOKEN and not works

    def _plain(self, node: ast.AST, **replaced: Any) -> list[Any]:
        """Write a node's fields; empty ones are left out, so that all versions of Python agree."""
        written: list[Any] = [type(node).__name__]
        for name, value in ast.iter_fields(node):
            value = replaced.get(name, value)
            if name in SKIPPED or value is None or value == []:
                continue
            if name in ("name", "names") and not isinstance(node, ast.ClassDef):
                value = self._local(value)
            written += [name, self.dump(value)]
        return written

    def _local(self, value: Any) -> Any:
        """Number a local name by its first occurrence."""
        if isinstance(value, list):
            return [self._local(one) for one in value]
        for scope in reversed(self.scopes):
            if value in scope:
                if not scope[value]:
                    self.numbers += 1
                    scope[value] = str(self.numbers)
                return scope[value]
        return value

    def _scope(self, node: Any) -> list[Any]:
        """Write a function, lambda or comprehension, whose names are its own."""
        outer_class, self.in_class = self.in_class, False
        arguments = getattr(node, "args", None)
        self.scopes.append({name: f"={name}" for name in _parameters(arguments)})
        body = node.body if isinstance(getattr(node, "body", None), list) else [node]
        for statement in body:
            for name, value in _bound_inside(statement, node).items():
                self.scopes[-1].setdefault(name, value)
        # At the top of the module the name does not count; a method is found by its name.
        named = {"name": ""} if not self.scopes[:-1] and not outer_class else {}
        if outer_class and hasattr(node, "name"):
            named = {"name": f"={node.name}"}
        written = self._plain(node, **named)
        self.scopes.pop()
        self.in_class = outer_class
        return written

    def _class(self, node: ast.ClassDef) -> list[Any]:
        """Write a class; the fields of a section of the configuration are definitions of their own."""
        outer, self.in_class = self.in_class, True
        fields = fields_of(self.key) if node in self.module.definitions.get(self.key.name, []) else {}
        body = [statement for statement in node.body if statement not in fields.values()]
        written = self._plain(node, name=None if not self.scopes else node.name, body=body)
        self.in_class = outer
        return written

    def _name(self, node: ast.Name) -> Any:
        target = self.resolve(node)
        if target is None:
            return self._local(node.id)
        return self._refer(target)

    def _attribute(self, node: ast.Attribute) -> Any:
        self.attributes.add(node.attr)
        target = self.resolve(node)
        return self._plain(node) if target is None else self._refer(target)

    def _refer(self, target: "Key | str") -> str:
        if isinstance(target, str):
            return f"@{target}"
        self.references.append(target)
        return "@"

    def _subscript(self, node: ast.Subscript) -> Any:
        target, index = self.resolve(node.value), node.slice
        if target in ("typing.Literal", "typing_extensions.Literal"):
            return "Literal"  # which values are allowed changes nothing for those that were
        if isinstance(target, Key) and isinstance(index, ast.Constant):
            module = None if is_outside(target.module) else module_of(target.module)
            if module is not None and index.value in module.tables.get(target.name, {}):
                return self._refer(target._replace(part=str(index.value)))
        return self._plain(node)

    def _dict(self, node: ast.Dict) -> Any:
        """Leave the entries of a table at the top of a module to themselves."""
        statements = self.module.definitions.get(self.key.name, [])
        is_table = not self.key.part and self.key.name in self.module.tables
        if is_table and any(getattr(statement, "value", None) is node for statement in statements):
            return "table"
        return self._plain(node)

    def _assign(self, node: ast.Assign) -> Any:
        if self._is_definition(node):
            return self.dump(node.value)
        return self._plain(node)

    def _annassign(self, node: ast.AnnAssign) -> Any:
        if self._is_definition(node) and not self.key.part:
            return self.dump(node.value)
        if self.in_class or self.key.part:  # pydantic, dataclasses and named tuples read annotations
            return ["field", self.dump(node.target), self.dump(node.annotation), self.dump(node.value)]
        return self._plain(node)

    def _is_definition(self, node: ast.stmt) -> bool:
        """Recognise `NAME = value` at the top of a module, whose name does not count."""
        return not self.scopes and not self.in_class and node in self.module.definitions.get(self.key.name, [])

    def _raise(self, node: ast.Raise) -> Any:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ["Raise", self.dump(error) if error is not None else ""]

    def _assert(self, node: ast.Assert) -> Any:
        return ["Assert", self.dump(node.test)]

    def _constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, str):
            if PROSE.search(node.value):
                return "prose"
            self.texts.add(node.value)
        return f"{type(node.value).__name__} {node.value!r}"

    def _joinedstr(self, node: ast.JoinedStr) -> Any:
        parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
        return "prose" if PROSE.search("".join(map(str, parts))) else self._plain(node)


def _imported(statement: ast.Import | ast.ImportFrom) -> dict[str, str]:
    """Return what an import binds: name -> dotted path."""
    if isinstance(statement, ast.Import):
        # `import a.b` binds a, `import a.b as c` binds c to a.b
        return {one.asname or one.name.split(".")[0]: one.name if one.asname else one.name.split(".")[0]
                for one in statement.names}  # fmt: skip
    if statement.level:
        raise ValueError(f"line {statement.lineno}: relative imports are not followed; import by the full name")
    return {one.asname or one.name: f"{statement.module}.{one.name}" for one in statement.names}


def _target(path: str) -> "Key | str":
    """Return the definition that a dotted path names, or the path itself for modules and what is not ours."""
    if source_of(path) is not None or not path.startswith(f"{PACKAGE.name}."):
        return path
    module, _, name = path.rpartition(".")
    return _member(module, name)


def _member(module: str, name: str) -> "Key | str":
    """Return what `module.name` is, through re-imports inside the package."""
    path = f"{module}.{name}"
    if source_of(module) is None or source_of(path) is not None:
        return path
    if is_outside(module):
        return Key(module, name)
    content = module_of(module)
    if name in content.definitions:
        return Key(module, name)
    return _target(content.imports[name]) if name in content.imports else path


def _dotted(target: "Key | str | None", node: ast.AST) -> str:
    if isinstance(target, str):
        return target
    return node.id if target is None and isinstance(node, ast.Name) else ""


def _stored(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Expr | ast.AugAssign | ast.Delete):
        return set()
    return set(_bound_inside(statement, None))


def _parameters(arguments: Any) -> list[str]:
    if not isinstance(arguments, ast.arguments):
        return []
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in every if argument is not None]


def _bound_inside(statement: ast.AST, scope: ast.AST | None) -> dict[str, str]:
    """Return the names that a statement binds in its own scope, imports with their path."""
    found: dict[str, str] = {}
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                found[node.id] = ""
            continue
        if isinstance(node, IMPORTS):
            found |= {name: f">{path}" for name, path in _imported(node).items()}
            continue
        if isinstance(node, NAMED) and node.name and node is not scope:
            found[node.name] = ""
        if node is scope or not isinstance(node, NESTED):
            waiting += ast.iter_child_nodes(node)
    return found


def _is_text(statement: Any) -> bool:
    """Recognise a docstring, or any other constant that is a statement."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
