"""The console script `ssl-core`: one command a stage, which is what the rules call, and two to look before running.

Stages, and with them torch and MLflow, are imported by the command that needs them. What a user got wrong (a
`ValueError`) ends as one line on stderr and exit code 2; the traceback is in the log.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

CONFIG = Path("config.yaml")
SCHEMA = Path("workflow/schemas/config.schema.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 interrupted, 1 for the rest."""
    chosen = _parser().parse_args(arguments)
    with _logged(chosen.log) as log:
        try:
            chosen.command(chosen)
        except KeyboardInterrupt:
            return 130
        except ValueError as error:
            if log is not None:
                log.write(traceback.format_exc())
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssl-core", description="Self-supervised pre-training of small networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shard = commands.add_parser("shard", help="write a data set as shards")
    shard.add_argument("card", type=Path)
    shard.add_argument("--output", type=Path, required=True)
    shard.set_defaults(command=_shard)

    pretrain = commands.add_parser("pretrain", help="pre-train a backbone")
    pretrain.add_argument("experiment")
    pretrain.add_argument("--manifest", type=Path, required=True)
    pretrain.add_argument("--output", type=Path, required=True)
    pretrain.add_argument("--checkpoint", type=Path, required=True)
    pretrain.set_defaults(command=_pretrain)

    evaluate = commands.add_parser("evaluate", help="measure a backbone by one protocol")
    evaluate.add_argument("experiment")
    evaluate.add_argument("evaluation")
    evaluate.add_argument("--backbone", type=Path, required=True)
    evaluate.add_argument("--manifest", type=Path, required=True)
    evaluate.add_argument("--output", type=Path, required=True)
    evaluate.set_defaults(command=_evaluate)

    table = commands.add_parser("table", help="gather results into one table")
    table.add_argument("results", type=Path, nargs="*", metavar="JSON")
    table.add_argument("--output", type=Path, required=True)
    table.add_argument("--grid", type=_json, help="what each experiment of a sweep sets, as JSON")
    table.set_defaults(command=_table)

    explain = commands.add_parser("explain", help="show an experiment with everything it leaves unsaid")
    explain.add_argument("experiment")
    explain.add_argument("--configfile", type=Path, nargs="*", default=[], help="laid over config.yaml")
    explain.set_defaults(command=_explain)

    schema = commands.add_parser("schema", help="print the schema of config.yaml")
    schema.set_defaults(command=_schema)

    for stage in (pretrain, evaluate):
        stage.add_argument("--spec", type=_json, required=True, help="the stage's own section, as JSON")
        stage.add_argument("--code", required=True, help="digest of the code that the stage runs")
    for stage in (shard, pretrain, evaluate):
        stage.add_argument("--threads", type=int, default=1)
    for command in (shard, pretrain, evaluate, table, explain, schema):
        command.add_argument("--log", type=Path, help="also keep what goes to the terminal in this file")
    return parser


def _shard(chosen: argparse.Namespace) -> None:
    from ssl_core.stages import shard

    shard.run(chosen.card, chosen.output, threads=chosen.threads)


def _pretrain(chosen: argparse.Namespace) -> None:
    from ssl_core.stages import pretrain

    pretrain.run(
        chosen.experiment,
        spec=chosen.spec,
        code=chosen.code,
        manifest=chosen.manifest,
        output=chosen.output,
        checkpoint=chosen.checkpoint,
        threads=chosen.threads,
    )


def _evaluate(chosen: argparse.Namespace) -> None:
    from ssl_core.stages import evaluate

    evaluate.run(
        chosen.experiment,
        chosen.evaluation,
        spec=chosen.spec,
        code=chosen.code,
        backbone=chosen.backbone,
        manifest=chosen.manifest,
        output=chosen.output,
        threads=chosen.threads,
    )


def _table(chosen: argparse.Namespace) -> None:
    from ssl_core.stages import table

    table.run(chosen.results, chosen.output, grid=chosen.grid)


def _schema(chosen: argparse.Namespace) -> None:
    from ssl_core import schema

    print(json.dumps(schema.generate(), indent=2))


def _explain(chosen: argparse.Namespace) -> None:
    """Print the resolved experiment, then what follows from it."""
    import yaml

    from ssl_core import config, schema
    from ssl_core.files import read_json
    from ssl_core.methods import base
    from ssl_core.training.schedules import effective_learning_rate

    settings: dict[str, Any] = {}
    for path in (CONFIG, *chosen.configfile):
        settings = schema.merge(settings, _yaml(path))
    schema.check(settings, read_json(SCHEMA), [path.stem for path in Path("datasets").glob("*.yaml")])
    experiments = schema.experiments(settings)
    if chosen.experiment not in experiments:
        raise ValueError(
            f"there is no experiment '{chosen.experiment}'{config.nearest(chosen.experiment, experiments)}"
        )
    resolved = base.resolve(experiments[chosen.experiment])
    print(yaml.safe_dump(resolved.model_dump(mode="json", serialize_as_any=True), sort_keys=False), end="")
    training = resolved.training
    rate = effective_learning_rate(training)
    print(f"# learning rate after warm-up: {rate:g}, for {training.batch_size} images a step")
    images = _num_images(resolved.dataset)
    if images is not None:
        steps = images // training.batch_size
        print(f"# {images} images: {steps} steps an epoch, {steps * training.epochs} in all")


def _num_images(dataset: Any) -> int | None:
    """Count the images of an experiment, or None before its data set is sharded."""
    from ssl_core.data.shards import Manifest

    manifest = Path("shards", dataset.name, "manifest.json")
    if dataset.subset is not None:
        return dataset.subset.images
    return Manifest.load(manifest).split(dataset.split).images if manifest.exists() else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run from the root of the project") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys at the top, found {content!r}")
    return content


def _one_line(error: ValueError) -> str:
    """Say an error in one line; pydantic's first fault stands for all."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
    return " ".join(str(error).split())


@contextmanager
def _logged(path: Path | None) -> Iterator[TextIO | None]:
    """Copy stderr into a file meanwhile; the terminal stays one, so that the progress line can overwrite itself."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stderr
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        copied = _Copied(terminal, file)
        sys.stderr = copied
        try:
            yield file
        finally:
            sys.stderr = terminal
            copied.finish()


class _Copied:
    """A stream whose finished lines also go to a file, without what a progress line overwrote."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream = stream
        self._file = file
        self._line = ""

    def write(self, text: str) -> int:
        """Write to both."""
        *lines, self._line = (self._line + text).split("\n")
        self._file.writelines(f"{_as_seen(line)}\n" for line in lines)
        return self._stream.write(text)

    def finish(self) -> None:
        """Keep a last line that no newline ended."""
        self._file.write(_as_seen(self._line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _as_seen(line: str) -> str:
    """Return what is left of a line after its carriage returns."""
    return line.rstrip("\r").rsplit("\r", 1)[-1]
