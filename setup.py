"""Copies the workflow into the wheel, where `ssl_core.experiments.bundled` finds it; the rest is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("Snakefile", "config.yaml")
FOLDERS = ("datasets", "recipes", "workflow/profiles", "workflow/report", "workflow/rules", "workflow/schemas")


class BuildWithWorkflow(build_py):
    """Builds the package with a copy of the clone's files in `ssl_core/_bundled/`."""

    def run(self) -> None:
        """Copy the files after the modules; an editable installation uses the clone's own."""
        super().run()
        if self.editable_mode:
            return
        bundled = Path(self.build_lib, "ssl_core", "_bundled")
        shutil.rmtree(bundled, ignore_errors=True)
        bundled.mkdir(parents=True)
        for name in FILES:
            shutil.copy(name, bundled / name)
        for name in FOLDERS:
            shutil.copytree(name, bundled / name)


setup(cmdclass={"build_py": BuildWithWorkflow})
