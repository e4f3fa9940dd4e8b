"""The table of edits of docs/reruns.md: each is made on a copy of the package; exactly the named stages run again."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ssl_core.experiments import code, definitions

METHODS = ("ressl", "moco", "pid")
PROTOCOLS = ("linear", "metrics")
PRETRAININGS = {f"pretrain {name}" for name in METHODS}
EVALUATIONS = {f"evaluate {name}" for name in PROTOCOLS}
VIEWS = {f"views {name}" for name in METHODS}
SHARDED = {"type": "image_folder", "path": "images"}


@pytest.fixture
def package(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package that digests are taken of."""
    copy = tmp_path / "ssl_core"
    shutil.copytree(root / "ssl_core", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with monkeypatch.context() as patch:
        patch.setattr(definitions, "PACKAGE", copy)
        yield copy
    forget()


def forget() -> None:
    """Empty the caches: a process reads each file once."""
    for module in (code, definitions):
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def digests() -> dict[str, str]:
    """Digest the code of every stage, for some methods and protocols."""
    forget()
    specs = {name: {"method": {"name": name}, "backbone": {"name": "resnet18"}} for name in METHODS}
    found = {f"pretrain {name}": code.pretraining_code(spec) for name, spec in specs.items()}
    found |= {f"views {name}": code.views_code(spec) for name, spec in specs.items()}
    found |= {f"export {name}": code.export_code(spec) for name, spec in specs.items()}
    found |= {f"evaluate {name}": code.evaluation_code({"protocol": name}) for name in PROTOCOLS}
    found |= {name: code.stage_code(name) for name in ("adopt", "curves", "draw", "cost", "table")}
    return found | {"shard": code.stage_code("shard", {"source": SHARDED})}


@cache
def unedited() -> dict[str, str]:
    """Digest the code of a copy before its first edit, which is the same for all tests."""
    return digests()


def changed_by(edit: Callable[[], Any]) -> set[str]:
    """Name the stages whose digest an edit changes, the first of a copy."""
    before = unedited()
    edit()
    after = digests()
    return {name for name in before if before[name] != after[name]}


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def defining(package: Path, name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef]:
    """Find the one function or class with this name, or `Class.method`."""
    outer, _, inner = name.partition(".")
    found = []
    texts = {path: path.read_text() for path in sources(package)}
    for path in [path for path, text in texts.items() if re.search(rf"^(def|class) {outer}\b", text, re.MULTILINE)]:
        for node in ast.parse(texts[path]).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == outer:
                members = node.body if inner else []
                methods = [one for one in members if isinstance(one, ast.FunctionDef) and one.name == inner]
                found += [(path, node)] if not inner else [(path, method) for method in methods]
    (one,) = found
    return one


def add_statement(package: Path, name: str) -> None:
    """Let a function do one thing more."""
    path, node = defining(package, name)
    first = node.body[1] if definitions._is_text(node.body[0]) else node.body[0]
    lines = path.read_text().split("\n")
    lines.insert(first.lineno - 1, f"{' ' * first.col_offset}more = abs(-1)")
    path.write_text("\n".join(lines))


def replace(package: Path, file: str, old: str, new: str) -> None:
    """Replace a piece of one file."""
    path = package / file
    text = path.read_text()
    assert re.search(old, text, flags=re.MULTILINE), f"{file} has no {old!r}"
    path.write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE))


class Reworded(ast.NodeTransformer):
    """Other words in every message that is raised and every docstring, and no type hints of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                part.value = f"Oh no, {part.value}!"
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = "Other words."
            return node
        return self.generic_visit(node)  # pyright: ignore[reportReturnType]


def test_comments_docstrings_messages_hints_and_layout_run_nothing_again(package: Path) -> None:
    def edit() -> None:
        for path in sources(package):
            tree = Reworded().visit(ast.parse(path.read_text()))
            path.write_text("# A remark.\n" + ast.unparse(ast.fix_missing_locations(tree)))

    assert changed_by(edit) == set()


def test_imports_run_nothing_again(package: Path) -> None:
    def edit() -> None:
        for path in sources(package):
            path.write_text("import colorsys\n" + path.read_text().replace("import torch.nn.functional as F", "from torch.nn import functional as F"))  # fmt: skip # noqa: E501

    assert changed_by(edit) == set()


def test_another_function_of_the_same_name_elsewhere_is_a_change(package: Path) -> None:
    """An import that changes what a name means is no mere import."""

    def edit() -> None:
        replace(package, "methods/pid.py", r"^import torch\.nn\.functional as F", "from torch.special import softmax\nimport torch.nn.quantized.functional as F")  # fmt: skip # noqa: E501

    assert changed_by(edit) == {"pretrain pid", "views pid"}


def test_a_moved_function_runs_nothing_again(package: Path) -> None:
    def edit() -> None:
        path, node = defining(package, "info_nce")
        text = path.read_text()
        segment = ast.get_source_segment(text, node)
        assert segment is not None
        header = text[: text.index("\n\n\n")]
        (package / "blocks" / "moved.py").write_text(f"{header}\n\n\n{segment}\n")
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        path.write_text(f"from ssl_core.blocks.moved import info_nce\n{text.replace(segment, '')}")
        for other in sources(package):
            found = re.sub(
                rf"from {re.escape(module)} import (.*\b)info_nce\b",
                r"from ssl_core.blocks.moved import info_nce\nfrom " + module + r" import \1info_nce",
                other.read_text(),
            )
            other.write_text(found.replace(f"from {module} import info_nce\n", ""))

    assert changed_by(edit) == set()


def test_a_moved_file_runs_nothing_again(package: Path) -> None:
    def edit() -> None:
        (package / "networks" / "heads.py").rename(package / "blocks" / "projectors.py")
        for path in sources(package):
            path.write_text(path.read_text().replace("ssl_core.networks.heads", "ssl_core.blocks.projectors"))

    assert changed_by(edit) == set()


def test_a_renamed_function_class_and_variable_run_nothing_again(package: Path) -> None:
    def edit() -> None:
        for path in sources(package):
            text = re.sub(r"\bmlp\(", "perceptron(", path.read_text())
            text = re.sub(r"(import .*)\bmlp\b", r"\1perceptron", text)
            text = re.sub(r"\bQueue\b", "Ring", text)
            path.write_text(re.sub(r"\bslots\b", "places", text))

    assert changed_by(edit) == set()


def test_another_methods_code_runs_nothing_again(package: Path) -> None:
    assert changed_by(lambda: add_statement(package, "MoCo.forward")) == {"pretrain moco", "views moco"}


def test_another_methods_preset_runs_nothing_again(package: Path) -> None:
    assert changed_by(lambda: replace(package, "methods/moco.py", r'"shi": Preset\(', '"new": Preset({}, {}), "shi": Preset(')) == set()  # fmt: skip # noqa: E501
    assert changed_by(lambda: replace(package, "methods/npid.py", '"temperature": 0.07', '"temperature": 0.08')) == set()  # fmt: skip # noqa: E501


def test_the_preset_in_use_runs_its_experiments_again(package: Path) -> None:
    edited = changed_by(lambda: replace(package, "methods/pid.py", '"learning_rate": 0.1', '"learning_rate": 0.2'))
    assert edited == {"pretrain pid", "views pid", "export pid"}


def test_a_policy_that_nobody_uses_runs_nothing_again(package: Path) -> None:
    new = '"none": Augmentation(flip=0.0),\n    "new": Augmentation(flip=1.0),'
    assert changed_by(lambda: replace(package, "data/views.py", r'"none": Augmentation\(flip=0\.0\),', new)) == set()
    assert changed_by(lambda: replace(package, "data/views.py", r'("aug_plus": .*"hue": )0\.4', r"\g<1>0.3")) == set()


def test_a_key_that_no_stage_reads_runs_nothing_again(package: Path) -> None:
    def edit() -> None:
        replace(
            package,
            "config.py",
            r"^    epochs: PositiveInt = 200",
            "    epochs: PositiveInt = 200\n    motto: str = ''",
        )
        replace(package, "config.py", r"^    source: str", "    doi: str | None = None\n    source: str")
        replace(package, "methods/moco.py", r"^    temperature: ", "    motto: str = ''\n    temperature: ")

    assert changed_by(edit) == set()


def test_a_default_that_a_stage_reads_is_a_change(package: Path) -> None:
    edited = changed_by(lambda: replace(package, "config.py", "nesterov: bool = False", "nesterov: bool = True"))
    assert edited >= PRETRAININGS


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("draw_views", VIEWS),  # the picture of the views
        ("draw_curves", {"curves"}),
        ("draw_confusion", {"draw"}),
        ("as_html", {"table"}),
        ("ReSSL.forward", {"pretrain ressl", "views ressl"}),  # a method
        ("Queue.enqueue", {f"{stage} {name}" for stage in ("pretrain", "views") for name in ("ressl", "moco")}),
        ("Trainer._one_step", PRETRAININGS),  # the loop
        ("Lars.step", PRETRAININGS | {"evaluate linear"}),  # an optimizer
        (  # ReSSL's views: its class names the frozen teacher
            "build_backbone",
            PRETRAININGS | EVALUATIONS | {f"export {name}" for name in METHODS} | {"adopt", "cost", "views ressl"},
        ),
        ("_crop", PRETRAININGS | VIEWS | EVALUATIONS),  # the graph of the views
        ("uniformity", {"evaluate metrics"}),  # a protocol
        ("write_shards", {"shard"}),  # sharding, whose result is printed
        ("open_image_folder", {"shard"}),  # the kind of source of the card
    ],
)
def test_a_statement_runs_again_what_it_moves(package: Path, function: str, expected: set[str]) -> None:
    assert changed_by(lambda: add_statement(package, function)) == expected


def test_the_loader_of_pairs_counts_only_for_methods_that_use_it(package: Path) -> None:
    spec = {"method": {"name": "bingo"}, "backbone": {"name": "resnet18"}}
    forget()
    before = code.pretraining_code(spec)
    for function in ("BagLoader._run", "pair_graph", "_read_pairs"):
        assert changed_by(lambda function=function: add_statement(package, function)) == set()
        assert code.pretraining_code(spec) != before
        before = code.pretraining_code(spec)


def test_statements_that_move_no_result_run_nothing_again(package: Path) -> None:
    def edit() -> None:
        # Another kind of source, the tracking, files that appear whole, checks of the configuration
        for function in ("open_voc", "Run.headline", "write_json", "check_targets"):
            add_statement(package, function)
        for function in ("start_ranks", "Team.raise_failure"):  # processes and nodes
            add_statement(package, function)

    assert changed_by(edit) == set()


def test_a_template_is_part_of_the_code_that_names_it(package: Path) -> None:
    assert changed_by(lambda: replace(package, "report/page.html", "<body", "<body lang='en'")) == {"table"}


def test_a_proven_edit_runs_nothing_again(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"method": {"name": "moco"}, "backbone": {"name": "resnet18"}}
    roots = (code.Key("ssl_core.stages.pretrain", "run"), *code._method(spec))
    forget()
    old, before = code.pretraining_code(spec), set(code.meanings(*roots, spec=spec))
    add_statement(package, "MoCo.forward")
    forget()
    now = set(code.meanings(*roots, spec=spec))
    assert code.pretraining_code(spec) != old
    proof = {"before": sorted(before - now), "now": sorted(now - before)}
    monkeypatch.setattr(code, "PROVEN", tmp_path / "proven.json")
    code.PROVEN.write_text(code.canonical({"proofs": [proof]}))
    forget()
    assert code.pretraining_code(spec) == old


def test_relative_imports_are_refused(package: Path) -> None:
    path = package / "methods" / "pid.py"
    path.write_text("from . import base\n" + path.read_text())
    with pytest.raises(ValueError, match="relative imports"):
        digests()


def test_an_unknown_name_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match=r"ssl_core\.stages\.shard defines no walk"):
        code.code_digest(code.Key("ssl_core.stages.shard", "walk"))
    with pytest.raises(ValueError, match=r"ssl_core\.methods\.nothing"):
        code.pretraining_code({"method": {"name": "nothing"}})
