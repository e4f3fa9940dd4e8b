"""`ssl-core init`: a folder of the user's own, in which the installed workflow runs. Torch-free."""

from pathlib import Path

from ssl_core.experiments import bundled

PROFILE = "workflow/profiles/slurm/config.yaml"
SNAKEFILE = """\
# The workflow of the installed package. Configuration, cards and results are in this folder.
from ssl_core.experiments import bundled


configfile: "config.yaml"


module pretraining:
    snakefile:
        str(bundled.SNAKEFILE)
    config:
        config


use rule * from pretraining


# Rules of your own go here. They can take any file in results/ as an input.
"""


def create(folder: Path) -> list[Path]:
    """Write Snakefile, config.yaml, the demonstration's card and the SLURM profile into `folder`; return the files.

    Raises `ValueError`, before anything is written, if one of them exists or `folder` is a file.
    """
    contents = {
        folder / "Snakefile": SNAKEFILE,
        folder / "config.yaml": bundled.CONFIG.read_text(encoding="utf-8"),
        folder / "datasets" / "demo.yaml": (bundled.CARDS / "demo.yaml").read_text(encoding="utf-8"),
        folder / PROFILE: (bundled.ROOT / PROFILE).read_text(encoding="utf-8"),
    }
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name another")
    for path in contents:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} exists: remove it, or name another folder (nothing was written)")
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(contents)
