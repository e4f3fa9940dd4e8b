"""Run `snakemake --lint` and fail on its remarks but one: the environment is .venv, made from requirements.lock."""

import re
import subprocess
import sys

NOT_OURS = "Specify a conda environment or container for each rule."


def main() -> int:
    """Print what Snakemake says if there is more than that; return the exit code."""
    answer = subprocess.run(["snakemake", "--lint"], capture_output=True, text=True)
    told = answer.stdout + answer.stderr
    remarks = re.findall(r"^ {4}\* (.*?):?$", told, flags=re.MULTILINE)
    others = [remark for remark in remarks if remark != NOT_OURS]
    if others or (answer.returncode and not remarks):
        print(told, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
