"""The environment, the wheel and the console script."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_the_folder_of_cards_is_not_importable(root: Path, tmp_path: Path) -> None:
    """A console script has its own folder on the path, not the project's root."""
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
    text = "".join(path.read_text() for path in sorted(root.glob("requirements*.lock")))
    for lock in (text, (root / "tests" / "data" / "moto.lock").read_text()):
        assert "://" not in lock
        assert "--index" not in lock
    blocks = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)(.*?)(?=^[A-Za-z0-9]|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    locked: dict[str, list[str]] = {}
    for name, version, rest in blocks:
        assert "--hash=sha256:" in rest, name
        locked.setdefault(name, []).append(version)
    requirements = project(root)["project"]
    extras = requirements["optional-dependencies"]
    for line in [*requirements["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        assert all(requirement.specifier.contains(version) for version in locked[requirement.name]), line


def test_committed_files_name_no_registry(root: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    for name in names:
        text = (root / name).read_bytes()
        assert b"--index-url" not in text or name.startswith("tests/"), name
        assert b"--extra-index-url" not in text or name.startswith("tests/"), name


def tracked_files(root: Path) -> list[Path]:
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return [Path(name) for name in answer.stdout.split("\0") if name]


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to a successful end and return its output."""
    process = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked files, built without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files(root):
        if (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.long
def test_the_wheel_has_all_files_of_the_package_and_the_workflow(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in tracked_files(root):
        if path.parts[0] == "ssl_core" and (root / path).is_file():
            assert str(path) in names, path
        if path.parts[0] in ("Snakefile", "config.yaml", "datasets", "recipes", "workflow") and path.suffix != ".py":
            assert str("ssl_core/_bundled" / path) in names, path
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ssl_core", next(top for top in tops if top.endswith(".dist-info"))}


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with only the wheel, which also sees the packages of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    packages = Path(
        run(folder / "bin/python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    )
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder / "bin"


@pytest.mark.long
def test_an_installed_wheel_ends_with_a_result_in_each_of_two_folders(installed: Path, tmp_path: Path) -> None:
    programs = os.pathsep.join([str(installed), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": programs}
    python = installed / "python"
    place = run(python, "-c", "import ssl_core; print(ssl_core.__file__)", cwd=tmp_path, environment=environment)
    assert place.startswith(str(installed.parent))
    bytes_of_backbones = []
    for name in ("first", "second"):
        run(installed / "ssl-core", "init", name, cwd=tmp_path, environment=environment)
        folder = tmp_path / name
        configuration = yaml.safe_load((folder / "config.yaml").read_text())
        experiment = configuration["experiments"]["ressl_r18"]
        experiment["backbone"] = {"name": "mobilenet_v3_small", "stem": "small"}
        experiment["dataset"]["subset"] = {"images": 128}
        experiment["method"]["queue_size"] = 64
        experiment["training"] |= {"epochs": 1, "batch_size": 32, "warmup_epochs": 0}
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
        target = "results/ressl_r18/knn.json"
        snakemake = [python, "-m", "snakemake", "--cores", "2", target]
        run(*snakemake, cwd=folder, environment=environment)
        assert (folder / target).is_file()
        assert "Nothing to be done" in run(*snakemake, cwd=folder, environment=environment)
        bytes_of_backbones.append((folder / "results/ressl_r18/backbone.safetensors").read_bytes())
        assert "queue_size: 64" in run(
            installed / "ssl-core", "explain", "ressl_r18", "--no-time", cwd=folder, environment=environment
        )
    assert bytes_of_backbones[0] == bytes_of_backbones[1]
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_github_files_use_what_the_makefile_and_the_lock_have(root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    assert set(re.findall(r"make ([\w-]+)", workflow)) <= targets
    ruled_in = project(root)["project"]["requires-python"]
    versions = yaml.safe_load(workflow)["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(SpecifierSet(ruled_in).contains(version) for version in versions)
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lock = (root / "requirements.lock").read_text()
    for hook in hooks:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"\n{tool}==" in lock, tool
