"""The console script `ssl-core`: one command a stage, which is what the rules call, and some to look before running.

Stages, and with them torch and MLflow, are imported by the command that needs them. What a user got wrong (a
`ValueError`) ends as one line on stderr and exit code 2; the traceback is in the log.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ssl_core import mistakes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 interrupted, 1 for the rest."""
    chosen = _parser().parse_args(arguments)
    with _logged(chosen.log) as log:
        try:
            chosen.command(chosen)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            kept = f" (log: {chosen.log})" if chosen.log else ""
            told = mistakes.explain(error)
            if told is None:
                traceback.print_exc()
                print(f"error: {type(error).__name__}, a fault of the program{kept}", file=sys.stderr)
                return 1
            if log is not None:
                log.write(traceback.format_exc())
            print(f"error: {told}{kept}", file=sys.stderr)
            return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-core",
        description="Self-supervised pre-training of small networks.",
        epilog="Look with explain, views, doctor and compare; Snakemake calls the rest (snakemake --cores all). "
        "`ssl-core COMMAND --help` says more.",
    )
    commands = parser.add_subparsers(required=True, dest="name", metavar="COMMAND")

    shard = commands.add_parser("shard", help="write a data set as shards")
    shard.add_argument("card", type=Path)
    shard.add_argument("--output", type=Path, required=True)

    pretrain = commands.add_parser("pretrain", help="pre-train a backbone")
    pretrain.add_argument("experiment")
    pretrain.add_argument("--manifest", type=Path, required=True)
    pretrain.add_argument("--output", type=Path, required=True)
    pretrain.add_argument("--checkpoint", type=Path, required=True)

    adopt = commands.add_parser("adopt", help="take a backbone from weights that were trained elsewhere")
    adopt.add_argument("experiment")
    adopt.add_argument("--manifest", type=Path, required=True)
    adopt.add_argument("--output", type=Path, required=True)

    evaluate = commands.add_parser("evaluate", help="measure a backbone by one protocol")
    evaluate.add_argument("experiment")
    evaluate.add_argument("evaluation")
    evaluate.add_argument("--backbone", type=Path, required=True)
    evaluate.add_argument("--model", type=Path, nargs="?", help="the whole pre-trained model, where a protocol asks")
    evaluate.add_argument("--manifest", type=Path, required=True)
    evaluate.add_argument("--output", type=Path, required=True)

    export = commands.add_parser("export", help="write a backbone as others load it, with a model card")
    export.add_argument("experiment")
    export.add_argument("--spec", type=_json, required=True, help="the experiment's own section, as JSON")
    export.add_argument("--backbone", type=Path, required=True)
    export.add_argument("--card", type=Path, required=True, help="of the experiment's data set")
    export.add_argument("--results", type=Path, nargs="*", default=[], metavar="JSON")
    export.add_argument("--output", type=Path, required=True)

    cost = commands.add_parser("cost", help="measure what a backbone costs")
    cost.add_argument("experiment")
    cost.add_argument("evaluation")
    cost.add_argument("--backbone", type=Path, required=True)
    cost.add_argument("--onnx", type=Path, required=True)
    cost.add_argument("--pretrain", type=Path, help="the summary of the pre-training, where there was one")
    cost.add_argument("--output", type=Path, required=True)

    curves = commands.add_parser("curves", help="draw the history of a pre-training")
    curves.add_argument("experiment")
    curves.add_argument("--history", type=Path, required=True, metavar="CSV")
    curves.add_argument("--output", type=Path, required=True, metavar="PNG")

    table = commands.add_parser("table", help="gather results into one table")
    table.add_argument("results", type=Path, nargs="*", metavar="JSON")
    table.add_argument("--output", type=Path, required=True)
    table.add_argument("--grid", type=_json, help="what each experiment of a sweep sets, as JSON")
    table.add_argument("--seeds", type=_json, help="which experiments differ in their seed alone, as JSON")
    table.add_argument("--reported", type=_json, help="numbers from elsewhere to show beside, as JSON")

    compare = commands.add_parser("compare", help="print reported numbers beside the measured ones")
    compare.add_argument(
        "--configfile", type=Path, nargs="+", default=[], metavar="YAML", help="files laid over config.yaml"
    )
    compare.set_defaults(command=_compare)

    explain = commands.add_parser("explain", help="show an experiment with everything it leaves unsaid, and its cost")
    explain.add_argument(
        "--time",
        action=argparse.BooleanOptionalAction,
        help="measure ten steps to estimate the time of the run (default: if the data set is sharded)",
    )
    explain.set_defaults(command=_explain)

    views = commands.add_parser("views", help="draw what the networks see, without training")
    views.add_argument("--output", type=Path, default=Path("views.png"), metavar="PNG", help="default: views.png")
    views.set_defaults(command=_views)

    for look in (explain, views):
        look.add_argument("experiment", help="its name in config.yaml; also one that a sweep or seeds make")
        look.add_argument(
            "--configfile", type=Path, nargs="+", default=[], metavar="YAML", help="files laid over config.yaml"
        )
        look.add_argument("--threads", type=int, help="processor threads (default: all cores)")

    doctor = commands.add_parser("doctor", help="try what this machine can do, one line each")
    doctor.set_defaults(command=_doctor)

    schema = commands.add_parser("schema", help="print the schema of config.yaml")
    schema.set_defaults(command=_schema)

    for stage in (pretrain, adopt, evaluate, cost):
        stage.add_argument("--spec", type=_json, required=True, help="the stage's own section, as JSON")
        stage.add_argument("--code", required=True, help="digest of the code that the stage runs")
    for stage in (shard, pretrain, evaluate, export):
        stage.add_argument("--threads", type=int, default=1)
    stages = (shard, pretrain, adopt, evaluate, export, cost, curves, table)
    for stage in stages:
        stage.set_defaults(command=_stage)
    for command in (*stages, compare, explain, views, doctor, schema):
        command.add_argument("--log", type=Path, help="also keep what goes to the terminal in this file")
    return parser


def _stage(chosen: argparse.Namespace) -> None:
    """Call the stage with its arguments, which it has under the same names as the command line."""
    stage = importlib.import_module(f"ssl_core.stages.{chosen.name}")
    stage.run(**{name: value for name, value in vars(chosen).items() if name not in ("command", "name", "log")})


def _compare(chosen: argparse.Namespace) -> None:
    from ssl_core.experiments.overlays import load
    from ssl_core.look import compare

    print(compare.run(load(chosen.configfile).settings, Path("results")))


def _schema(chosen: argparse.Namespace) -> None:
    from ssl_core.look import schema_generation

    print(json.dumps(schema_generation.generate(), indent=2))


def _explain(chosen: argparse.Namespace) -> None:
    from ssl_core.look.explain import explain

    explain(chosen.experiment, chosen.configfile, timed=chosen.time, threads=chosen.threads or _cores())


def _views(chosen: argparse.Namespace) -> None:
    from ssl_core.look.preview import draw

    print(draw(chosen.experiment, chosen.configfile, chosen.output, threads=chosen.threads or _cores()))


def _doctor(chosen: argparse.Namespace) -> None:
    from ssl_core.look.doctor import examine

    if not examine():
        raise SystemExit(1)


def _cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None


@contextmanager
def _logged(path: Path | None) -> Iterator["_Log | None"]:
    """Copy what is printed into a file; the terminal stays one, so that the progress line can overwrite itself."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = sys.stdout, sys.stderr
    with open(path, "wb", buffering=0) as file:
        log = _Log(file)
        copies = [_Copied(stream, log) for stream in streams]
        sys.stdout, sys.stderr = copies
        try:
            yield log
        finally:
            sys.stdout, sys.stderr = streams
            for copied in copies:
                copied.finish()


class _Log:
    """A text file that loses what a full disk does not take: no reason to end a run."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write at once, whatever the text."""
        with suppress(OSError):
            self._file.write(text.encode("utf-8", "backslashreplace"))


class _Copied:
    """A stream whose finished lines also go to a file, without what a progress line overwrote."""

    def __init__(self, stream: TextIO, file: _Log) -> None:
        self._stream = stream
        self._file = file
        self._line = ""

    def write(self, text: str) -> int:
        """Write to both."""
        *lines, self._line = (self._line + text).split("\n")
        self._file.write("".join(f"{_as_seen(line)}\n" for line in lines))
        return self._stream.write(text)

    def finish(self) -> None:
        """Keep a last line that no newline ended."""
        self._file.write(_as_seen(self._line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _as_seen(line: str) -> str:
    """Return what is left of a line after its carriage returns."""
    return line.rstrip("\r").rsplit("\r", 1)[-1]
