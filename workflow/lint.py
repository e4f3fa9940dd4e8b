"""Run `snakemake --lint` and fail on its remarks, except the one on conda: .venv is the environment."""

import re
import subprocess
import sys

IGNORED = "Specify a conda environment or container for each rule."


def main() -> int:
    """Print Snakemake's output if it has other remarks; return the exit code."""
    answer = subprocess.run(["snakemake", "--lint"], capture_output=True, text=True)
    output = answer.stdout + answer.stderr
    remarks = re.findall(r"^ {4}\* (.*?):?$", output, flags=re.MULTILINE)
    others = [remark for remark in remarks if remark != IGNORED]
    if others or (answer.returncode and not remarks):
        print(output, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
