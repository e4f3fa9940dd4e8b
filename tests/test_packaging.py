"""The environment is what the files say, on any machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_the_folder_of_cards_is_no_package(root: Path, tmp_path: Path) -> None:
    """A console script starts with its own folder on the path; `datasets` must not be found from the project's root."""
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, ssl_core.cli\n"
        "print(ssl_core.cli.__file__)\n"
        "print(importlib.util.find_spec('datasets'), importlib.util.find_spec('workflow'))\n"
    )
    answer = subprocess.run([sys.executable, script], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == [str(root / "ssl_core" / "cli.py"), "None None"]


def test_the_console_script_is_installed() -> None:
    answer = subprocess.run([Path(sys.executable).parent / "ssl-core", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0
    assert "pretrain" in answer.stdout


def test_the_lock_has_every_requirement_with_hashes_and_no_address(root: Path) -> None:
    text = (root / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
    blocks = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)(.*?)(?=^[A-Za-z0-9]|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    locked: dict[str, list[str]] = {}
    for name, version, rest in blocks:
        assert "--hash=sha256:" in rest, name
        locked.setdefault(name, []).append(version)
    wanted = project(root)["project"]
    for line in [*wanted["dependencies"], *wanted["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        assert all(requirement.specifier.contains(version) for version in locked[requirement.name]), line


def test_committed_files_name_no_registry(root: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    for name in names:
        text = (root / name).read_bytes()
        assert b"--index-url" not in text or name.startswith("tests/"), name
        assert b"--extra-index-url" not in text or name.startswith("tests/"), name
