"""Run `snakemake --lint` and fail on its remarks but one: the environment is .venv, made from requirements.lock."""

import json
import subprocess
import sys

NOT_OURS = "Specify a conda environment or container for each rule."


def main() -> int:
    """Print the remarks that remain; return how many there are, as the exit code."""
    answer = subprocess.run(["snakemake", "--lint", "json"], capture_output=True, text=True)
    start = answer.stdout.find("{")
    if start < 0:
        print(answer.stdout + answer.stderr, file=sys.stderr)
        return 1
    found = json.loads(answer.stdout[start:])
    remarks = [
        f"{item['for'].get('rule') or item['for'].get('snakefile')}: {lint['title']} {lint['body']}"
        for item in [*found["snakefiles"], *found["rules"]]
        for lint in item["lints"]
        if lint["title"] != NOT_OURS
    ]
    print("\n".join(remarks) or "snakemake --lint: nothing to say", file=sys.stderr)
    return min(len(remarks), 1)


if __name__ == "__main__":
    sys.exit(main())
