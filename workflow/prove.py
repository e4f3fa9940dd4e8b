"""Prove that edited code gives the same bytes as before, and record it, so that no results are computed again.

`make prove BASE=<revision>` compares the working tree with a git revision. For each method, each protocol and the
sharding whose code digest differs, a few steps are run with both on the demonstration, on one thread. Where all bytes
agree, the digests of the definitions that changed go into ssl_core/experiments/proven.json, beside the evidence.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STAGE = "from ssl_core.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
DATASET = "demo"
BACKBONE = {"name": "resnet18", "stem": "tiny"}
TRAINING = {
    "epochs": 2, "batch_size": 64, "warmup_epochs": 0, "precision": "fp32", "accumulation": 2,
    "schedule": "cosine",  # CompRess's milestones are beyond two epochs
}  # fmt: skip
SUBSET = {"images": 256, "seed": 0}
SMALL = {  # methods whose published sizes do not fit the demonstration
    "moco": {"queue_size": 64}, "ressl": {"queue_size": 64}, "swav": {"queue_size": 64, "num_prototypes": 64},
    "dino": {"num_outputs": 64},
}  # fmt: skip
TIMED = {"cost", "quantised"}  # protocols that measure times


class Tree:
    """A checkout whose stages are run."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        work.mkdir(parents=True)

    def stage(self, *arguments: str) -> None:
        """Run one stage on one thread; raise `RuntimeError` with the end of its output if it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "SSL_TRACKING": "off"}
        command = [sys.executable, "-P", "-c", STAGE, *arguments]
        run = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{self.folder.name}: {' '.join(arguments[:3])}: {run.stderr.strip()[-500:]}")

    def code(self, roots: str, spec: Mapping[str, Any]) -> dict[str, str]:
        """Return the digests of the definitions behind one job, with their names."""
        program = (
            "import json, sys; from pathlib import Path; from ssl_core.experiments import code, definitions;"
            f"definitions.PACKAGE = Path({str(self.folder)!r}, 'ssl_core'); spec = json.loads(sys.argv[1]);"
            f"meanings = code.meanings(*code.{roots}, spec=spec);"
            "print(json.dumps({digest: '.'.join(filter(None, key)) for digest, key in meanings.items()}))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the tool is this tree's, for both
        answer = subprocess.run(
            [sys.executable, "-P", "-c", program, json.dumps(spec)], env=environment, capture_output=True, text=True
        )
        if answer.returncode:
            raise RuntimeError(answer.stderr[-2000:])
        return json.loads(answer.stdout)


def main() -> int:
    """Compare, print one line for each job, write the list; 1 if any bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="git revision that the working tree is compared with")
    parser.add_argument("--only", nargs="*", help="names of jobs, for example 'pretrain moco'")
    parser.add_argument("--write", action="store_true", help="add the proofs to ssl_core/experiments/proven.json")
    chosen = parser.parse_args()
    revision = git("rev-parse", chosen.base)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the checkout too
    with tempfile.TemporaryDirectory(prefix="ssl-core-prove-") as folder:
        base = Path(folder, "base")
        git("worktree", "add", "--detach", str(base), revision)
        try:
            trees = Tree(base, Path(folder, "before")), Tree(ROOT, Path(folder, "now"))
            return compare(*trees, revision, only=chosen.only, write=chosen.write)
        finally:
            git("worktree", "remove", "--force", str(base))


def compare(before: Tree, now: Tree, revision: str, *, only: list[str] | None, write: bool) -> int:
    """Run every job whose code differs with both trees."""
    proofs, failed = [], False
    ready = False
    for name, roots, spec in jobs():
        if only and name not in only:
            continue
        method = spec.get("method", {}).get("name")
        if method and not Path(before.folder, "ssl_core", "methods", f"{method}.py").exists():
            print(f"{name}: new", flush=True)
            continue
        old, new = before.code(roots, spec), now.code(roots, spec)
        if old.keys() == new.keys():
            print(f"{name}: same code", flush=True)
            continue
        if not ready:
            prepare(before, now)
            ready = True
        first, second = (run(tree, name, spec) for tree in (before, now))
        same = first == second
        failed |= not same
        changed = sorted({new[digest] for digest in new.keys() - old.keys()})
        print(f"{name}: {'same bytes' if same else 'OTHER BYTES'} after edits of {', '.join(changed)}", flush=True)
        if same:
            proofs.append(
                {
                    "job": name,
                    "before": sorted(old.keys() - new.keys()),
                    "now": sorted(new.keys() - old.keys()),
                    "edited": changed,
                    "evidence": {"base": revision, "sha256": first, "spec": spec},
                }
            )
    if write and proofs:
        record(proofs)
    return int(failed)


def jobs() -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield a name, the entry points and the settings for sharding, each method and each protocol."""
    yield "shard", "_stage('shard')", {"source": {"type": "digits"}}
    for path in sorted((ROOT / "ssl_core" / "methods").glob("[a-z]*.py")):
        method = {"name": path.stem, **SMALL.get(path.stem, {})}
        if path.stem == "base":
            continue
        if "    teacher: Teacher\n" in path.read_text():
            method["teacher"] = {"weights": "start/backbone.safetensors"}
        if path.stem in ("seed", "compress", "disco", "bingo"):
            method["queue_size"] = 64
        dataset = {"name": DATASET, "subset": SUBSET}
        spec = {"dataset": dataset, "backbone": BACKBONE, "method": method, "training": TRAINING}
        yield f"pretrain {path.stem}", "_pretraining(spec)", spec
    for path in sorted((ROOT / "ssl_core" / "evaluations").glob("[a-z]*.py")):
        if path.stem not in {"base", *TIMED}:
            spec = {"protocol": path.stem, "dataset": {"name": DATASET}, **LIGHT.get(path.stem, {})}
            yield f"evaluate {path.stem}", "_evaluation(spec)", spec


LIGHT = {"linear": {"epochs": 2}, "finetune": {"epochs": 2}, "pictures": {"images": 200}}


def prepare(*trees: Tree) -> None:
    """Shard the demonstration and train a first network, with each tree."""
    method = {"name": "simclr"}
    spec = {
        "dataset": {"name": DATASET, "subset": SUBSET},
        "backbone": BACKBONE,
        "method": method,
        "training": TRAINING,
    }
    for tree in trees:
        tree.stage("shard", str(tree.folder / "datasets" / f"{DATASET}.yaml"), "--output", f"shards/{DATASET}")
        pretrain(tree, "start", spec)


def run(tree: Tree, name: str, spec: dict[str, Any]) -> dict[str, str]:
    """Run a job and digest what it wrote, without digests, versions and times."""
    kind, _, subject = name.partition(" ")
    if kind == "shard":
        return {path.name: sha256(path.read_bytes()) for path in sorted(tree.work.glob("shards/*/*"))}
    if kind == "pretrain":
        return pretrain(tree, subject, spec)
    output = f"start/{subject}.json"
    files = ["--backbone", "start/backbone.safetensors", "--model", "start/model.safetensors", "--output", output]
    tree.stage("evaluate", "start", subject, *settings(spec), *files)
    result = json.loads((tree.work / output).read_text())
    numbers = {key: result[key] for key in ("metrics", "baselines", "num_train", "num_test")}
    return {"numbers": sha256(json.dumps(numbers, sort_keys=True).encode())}


def settings(spec: dict[str, Any]) -> list[str]:
    """Write the arguments that stages share."""
    return ["--spec", json.dumps(spec), "--code", "0", "--manifest", f"shards/{DATASET}/manifest.json"]


def pretrain(tree: Tree, name: str, spec: dict[str, Any]) -> dict[str, str]:
    """Pre-train and digest weights and history."""
    files = ["--output", name, "--checkpoint", f"checkpoints/{name}.pt"]
    if spec["method"]["name"] == "bingo":
        shards = f"shards/{DATASET}/manifest.json"
        tree.stage("bags", name, "--spec", json.dumps(spec), "--manifest", shards, "--output", f"{name}/bags.npy")
    tree.stage("pretrain", name, *settings(spec), *files)
    content = (tree.work / name / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")  # names digests and versions
    rows = (tree.work / name / "history.csv").read_text().split("\n", 1)[1]  # columns may be renamed
    return {"tensors": sha256(content[8 + header :]), "history": sha256(rows.encode())}


def record(proofs: list[dict[str, Any]]) -> None:
    """Add proofs to the committed list, with the machine that they were made on."""
    sys.path.insert(0, str(ROOT))
    from ssl_core.provenance import hardware, versions

    path = ROOT / "ssl_core" / "experiments" / "proven.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = {"hardware": hardware(), "versions": versions()}
    content["proofs"] += [{**proof, "evidence": {**proof["evidence"], **machine}} for proof in proofs]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"error: git {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
