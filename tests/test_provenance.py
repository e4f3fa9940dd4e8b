"""Digests change with behaviour and with nothing else."""

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_core import provenance


@pytest.fixture
def package(tmp_path: Path, root: Path) -> Path:
    """A package `ssl_core` of a few modules, with the real provenance module in it."""
    files = {
        "__init__.py": "",
        "files.py": "VALUE = 1\n",
        "network.py": 'def width():\n    """Say how wide."""\n    return 4\n',
        "parts/__init__.py": "",
        "parts/head.py": "from .. import network\n",
        "parts/lonely.py": "VALUE = 1\n",
        "stage.py": "import os\n\n\ndef run():\n    from ssl_core.parts import head\n    from ssl_core import files\n",
    }
    for name, text in files.items():
        (tmp_path / "ssl_core" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ssl_core" / name).write_text(text)
    shutil.copy(root / "ssl_core" / "provenance.py", tmp_path / "ssl_core")
    return tmp_path / "ssl_core"


@pytest.fixture
def digest_of(package: Path) -> Callable[[str], str]:
    """Digest a module of that package in a fresh process, since answers are kept within one."""

    def ask(module: str) -> str:
        code = f"from ssl_core.provenance import code_digest; print(code_digest({module!r}))"
        return subprocess.run(
            [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
        ).stdout

    return ask


def test_comments_docstrings_and_layout_change_nothing(package: Path, digest_of: Callable[[str], str]) -> None:
    before = digest_of("ssl_core.stage")
    (package / "network.py").write_text('# Why.\ndef width():\n\n    """Other words."""\n    return (4)  # four\n')
    assert digest_of("ssl_core.stage") == before


def test_no_field_that_only_some_versions_of_python_write_down_counts() -> None:
    function = "FunctionDef(name='f', args=arguments(), body=[Return(value=Constant())])"  # 3.12: and type_params=[]
    assert provenance._dump(ast.parse("def f(): return None")) == f"Module(body=[{function}])"


def test_code_two_imports_away_changes_the_digest(package: Path, digest_of: Callable[[str], str]) -> None:
    before = digest_of("ssl_core.stage")  # imports parts.head inside a function, which imports network relatively
    (package / "network.py").write_text("def width():\n    return 5\n")
    assert digest_of("ssl_core.stage") != before


def test_a_package_file_on_the_way_counts(package: Path, digest_of: Callable[[str], str]) -> None:
    before = digest_of("ssl_core.stage")
    (package / "parts" / "__init__.py").write_text("SETTING = 1\n")
    assert digest_of("ssl_core.stage") != before


@pytest.mark.parametrize("name", ["files.py", "parts/lonely.py"])
def test_bookkeeping_and_what_is_not_imported_do_not_count(
    package: Path, digest_of: Callable[[str], str], name: str
) -> None:
    before = digest_of("ssl_core.stage")
    (package / name).write_text("VALUE = 2\n")
    assert digest_of("ssl_core.stage") == before


def test_the_order_of_modules_does_not_count() -> None:
    names = ("ssl_core.config", "ssl_core.data.views")
    assert provenance.code_digest(*names) == provenance.code_digest(*reversed(names))


def test_a_method_is_found_by_what_its_stage_is_given_only() -> None:
    """The stage must not import methods by itself, else a change of one would train all again."""
    stage = provenance.code_digest("ssl_core.stages.pretrain")
    assert stage != provenance.code_digest("ssl_core.stages.pretrain", "ssl_core.methods.ressl")


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"ssl_core\.methods\.nothing"):
        provenance.code_digest("ssl_core.methods.nothing")


def test_equal_sections_read_the_same_whatever_their_order() -> None:
    assert (
        provenance.canonical({"b": [1, 2.5], "a": {"d": None, "c": "é"}})
        == '{"a":{"c":"\\u00e9","d":null},"b":[1,2.5]}'
    )


def test_a_file_is_digested_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert provenance.file_digest(tmp_path / "one") == expected == provenance.digest("abc")


def test_versions_name_what_decides_numbers() -> None:
    assert {"python", "torch", "torchvision", "nvidia-dali-cuda130", "ssl-core"} <= set(provenance.versions())


def test_hardware_is_one_line() -> None:
    assert textwrap.shorten(provenance.hardware(), 1000) == provenance.hardware()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from ssl_core import provenance as p; p.versions(); p.hardware();"
        "p.code_digest('ssl_core.stages.pretrain'); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
