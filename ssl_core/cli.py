"""The console script `ssl-core`: one command per stage, which the rules call, and commands to look before running.

Commands import their stage, and with it torch and MLflow, when they run. A fault of the user's (`ValueError`) ends with
one line on stderr and exit code 2; its traceback is in the log.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TextIO

from ssl_core import late_compiler, mistakes, terminal
from ssl_core.experiments import processes
from ssl_core.files import use_utf8
from ssl_core.provenance import num_cores

LAYOUTS = ("moco", "swav", "dino", "byol", "simsiam")  # of `convert`
MAKE = "snakemake --cores all results/"  # Snakemake calls the stages with all their arguments
EXAMPLES = {
    "shard": "ssl-core shard demo --output shards/demo",
    "pretrain": f"{MAKE}ressl_r18/backbone.safetensors",
    "bags": f"{MAKE}bingo_r18/bags.npy (an experiment with method bingo)",
    "join": "SSL_RENDEZVOUS=10.0.0.1:29500 ssl-core join --threads 8",
    "sample-views": f"{MAKE}ressl_r18/views.png",
    "adopt": f"{MAKE}mine/backbone.safetensors (an experiment with `weights`)",
    "evaluate": f"{MAKE}ressl_r18/knn.json",
    "detect": f"{MAKE}ressl_r18/detection.json",
    "finetune": f"{MAKE}ressl_r18/finetune.json (with `finetune: {{protocol: finetune}}` in `evaluations`)",
    "export": f"{MAKE}ressl_r18/export/README.md",
    "quantise": f"{MAKE}ressl_r18/export/backbone.int8.onnx",
    "export-device": f"{MAKE}ressl_r18/export/backbone.tflite (or .pte)",
    "quantise-device": f"{MAKE}ressl_r18/export/backbone.int8.tflite (or .pte)",
    "export-classifier": f"{MAKE}ressl_r18/finetune/classifier.onnx",
    "cost": f"{MAKE}ressl_r18/cost.json",
    "quantised": f"{MAKE}ressl_r18/quantised.json",
    "curves": "ssl-core curves ressl_r18 --history results/ressl_r18/history.csv --output curves.png",
    "draw": "ssl-core draw ressl_r18 pictures --data results/ressl_r18/pictures/pictures.npz --output drawn",
    "figure": f"{MAKE}figures/accuracy.svg (an entry of `figures`)",
    "table": "ssl-core table results/ressl_r18/knn.json --output table.csv",
    "should-i-pretrain": f"{MAKE}should_i_pretrain.html --configfile=$(ssl-core recipes should_i_pretrain)",
    "init": "ssl-core init my_project",
    "recipes": "snakemake --cores all -n --configfile $(ssl-core recipes ressl_cifar10)",
    "compare": "ssl-core compare --configfile mine.yaml",
    "convert": "ssl-core convert moco_v2_800ep.pth.tar --layout moco -o moco.safetensors",
    "explain": "ssl-core explain ressl_r18 --no-time",
    "views": "ssl-core views ressl_r18 --output views.png",
    "doctor": "ssl-core doctor",
    "ui": "ssl-core ui --port 5001",
    "merge-tracking": "ssl-core merge-tracking",
    "completion": 'eval "$(ssl-core completion)"',
    "schema": "ssl-core schema > config.schema.json",
    "embed": "ssl-core embed photos --network results/ressl_r18 -o features.parquet",
    "neighbours": "ssl-core neighbours photos/1.jpg --network results/ressl_r18 --in photos -k 5",
    "predict": "ssl-core predict photos --network results/ressl_r18/finetune -o predictions.csv",
}
CARD = "a data set's name, whose card is in datasets/ or in the package, or the file of a card"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a fault of the user's, 130 if interrupted, else 1."""
    use_utf8()
    late_compiler.postpone()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
    try:
        _check_working_directory()
        with _only_writer(options):
            code = _run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as in `ssl-core schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # another process writes the same files, and its log
        return _report(error, None, None)


def _run(options: argparse.Namespace) -> int:
    with _logged(options.log) as log:
        try:
            if options.name == "shard":
                processes.keep_interrupts_from_forks()
            options.command(options)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            raise
        except Exception as error:
            return _report(error, options.log, log)
    return 0


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the working directory was removed: change to another folder and run again") from None


def _only_writer(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Return the lock of the stage's output, if it has one; take it before anything is written, the log included."""
    if options.name == "pretrain":
        return processes.one_writer(options.checkpoint.with_suffix(".lock"), f"experiment {options.experiment}")
    if options.name in ("detect", "finetune"):
        subject = f"evaluation {options.evaluation} of {options.experiment}"
        return processes.one_writer(options.checkpoint.with_suffix(".lock"), subject)
    if options.name == "shard":
        return processes.one_writer(options.output.with_name(f".{options.output.name}.lock"), str(options.output))
    return nullcontext()


def _report(error: Exception, path: Path | None, log: "_Log | None") -> int:
    """Print an error, as one line if the user can mend it; return the exit code."""
    place = f" (log: {path})" if path else ""
    explanation = mistakes.explain(error)
    if explanation is None:
        traceback.print_exc()
        print(f"{_error()} {type(error).__name__}, a fault of the program{place}", file=sys.stderr)
        return 1
    if log is not None:
        log.write(traceback.format_exc())
    print(f"{_error()} {explanation}{place}", file=sys.stderr)
    return 2


def _error() -> str:
    return terminal.coloured("error:", "red", sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-core",
        description="Self-supervised pre-training of small networks.",
        epilog="Begin with init; look with explain, views, doctor and compare; use a trained network with embed, "
        "neighbours and predict. Snakemake calls the stages "
        "(snakemake --cores all). Options of a command: ssl-core COMMAND --help.",
    )
    parser.add_argument("--version", action="version", version=f"ssl-core {metadata.version('ssl-core')}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")
    _add_stages(commands)
    _add_looks(commands)
    _add_uses(commands)
    for name, command in commands.choices.items():
        command.epilog = f"example: {EXAMPLES[name]}"
        command.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the example on one line, to be copied
        command.add_argument("--log", type=Path, help="also write the terminal's output to this file")
    return parser


def _add_stages(commands: Any) -> None:
    """Add the commands that rules call."""

    def add(name: str, description: str, *names: str, **paths: str) -> argparse.ArgumentParser:
        """Add a stage with the positional arguments `names` and with required options for `paths`."""
        stage = commands.add_parser(name, help=description, description=description)
        stage.set_defaults(command=_stage)
        for positional in names:
            stage.add_argument(positional)
        for option, metavar in paths.items():
            stage.add_argument(f"--{option}", type=Path, required=True, metavar=metavar)
        return stage

    shard = add("shard", "write a data set as shards", output="FOLDER")
    shard.add_argument("card", type=_card, help=CARD)
    pretrain = add("pretrain", "train a backbone", "experiment", manifest="JSON", output="FOLDER", checkpoint="FILE")
    bags = add("bags", "find the neighbours of each image by a teacher", "experiment", manifest="JSON", output="NPY")
    join = add("join", "train as a further node of a training that another node leads (SSL_RENDEZVOUS=host:port)")
    views = add("sample-views", "draw the views of an experiment", "experiment", manifest="JSON", output="PNG")
    adopt = add("adopt", "make a backbone of weights trained elsewhere", "experiment", manifest="JSON", output="FILE")
    measured = ("experiment", "evaluation")
    files = {"backbone": "FILE", "output": "JSON"}
    evaluate = add("evaluate", "measure a backbone by one protocol", *measured, **files, manifest="JSON")
    options = {"manifest": "JSON", "picture": "PNG", "checkpoint": "FILE"}
    detect = add("detect", "train and measure detectors with a backbone", *measured, **files, **options)
    options = {"manifest": "JSON", "checkpoint": "FILE"}
    finetune = add("finetune", "train a backbone with a classifier", *measured, **files, **options)
    for stage in (evaluate, finetune):
        help = "the whole pre-trained model, if the protocol needs it"
        stage.add_argument("--model", type=Path, nargs="?", help=help)
    export = add("export", "write a backbone with a model card", "experiment", backbone="FILE", output="FOLDER")
    export.add_argument("--card", type=_card, required=True, help=CARD)
    export.add_argument("--options", type=_json, help="the configuration's section `export`, as JSON")
    export.add_argument("--results", type=Path, nargs="*", default=[], metavar="JSON")
    quantise = add(
        "quantise",
        "write an exported network with 8-bit integers",
        "experiment",
        onnx="FILE",
        manifest="JSON",
        output="FILE",
    )
    files = {"backbone": "FILE", "output": "FILE"}
    for_device = add("export-device", "write a backbone for LiteRT or ExecuTorch", "experiment", **files)
    description = "write a backbone with 8-bit integers for LiteRT or ExecuTorch"
    small = add("quantise-device", description, "experiment", **files, manifest="JSON")
    for stage in (for_device, small):
        stage.add_argument("--options", type=_json, help="the configuration's section `export`, as JSON")
    for stage in (quantise, small):
        stage.add_argument("--dataset", type=_json, required=True, help="the data of the pre-training, as JSON")
    files = {"backbone": "FILE", "classifier": "FILE", "output": "ONNX"}
    classifier = add("export-classifier", "write a fine-tuned network as ONNX", *measured, **files)
    cost = add("cost", "measure the cost of a backbone", *measured, backbone="FILE", output="JSON", onnx="FILE")
    cost.add_argument("--pretrain", type=Path, help="the summary of the pre-training, if there was one")
    files = {"float32": "FILE", "int8": "FILE", "manifest": "JSON", "output": "JSON"}
    quantised = add("quantised", "measure an 8-bit network beside its original", *measured, **files)
    add("curves", "draw the history of a pre-training", "experiment", history="CSV", output="PNG")
    add("draw", "draw the pictures of an evaluation from its arrays", *measured, data="NPZ", output="FOLDER")
    figure = add("figure", "draw a figure of several experiments", "figure", output="SVG", results="FOLDER")
    table = add("table", "gather results into one table", output="CSV")
    table.add_argument("results", type=Path, nargs="*", metavar="JSON")
    table.add_argument("--grid", type=_json, help="the values that each experiment of a sweep sets, as JSON")
    table.add_argument("--seeds", type=_json, help="the experiments that differ only in their seed, as JSON")
    table.add_argument("--settings", type=Path, nargs="*", default=[], metavar="JSON", help="files pretrain.json")
    table.add_argument("--pictures", type=Path, nargs="*", default=[], metavar="PNG", help="shown beside the results")
    table.add_argument("--reported", type=_json, help="published numbers to show beside the results, as JSON")
    should = add("should-i-pretrain", "compare pre-training with training from scratch", output="HTML")
    should.add_argument("results", type=Path, nargs="+", metavar="JSON", help="fine-tunings")
    should.add_argument("--tunings", type=Path, nargs="*", default=[], metavar="JSON", help="their files cost.json")
    should.add_argument("--pretrainings", type=Path, nargs="*", default=[], metavar="JSON", help="files pretrain.json")
    should.add_argument("--plan", type=_json, required=True, help="the seeds and the experiments of each way, as JSON")
    bags.add_argument("--spec", type=_json, required=True, help="data set, teacher and bag size, as JSON")
    for stage in (pretrain, views, adopt, evaluate, detect, finetune, export, quantise, small, cost, quantised, figure):
        stage.add_argument("--spec", type=_json, required=True, help="settings of the stage's section, as JSON")
    for stage in (pretrain, adopt, evaluate, detect, finetune, cost, quantised):
        stage.add_argument("--code", required=True, help="digest of the code that the stage runs")
    for stage in (shard, pretrain, bags, join, evaluate, detect, finetune, export, for_device, small, classifier):
        stage.add_argument("--threads", type=_positive, default=1)


def _add_looks(commands: Any) -> None:
    """Add the commands that users call."""
    init = commands.add_parser(
        "init", help="make a folder of your own: Snakefile, config.yaml, datasets/, workflow/profiles/"
    )
    init.add_argument("folder", type=Path)
    init.set_defaults(command=_init)

    recipes = commands.add_parser("recipes", help="print the files of the recipes that come with the package")
    recipes.add_argument("recipe", nargs="?", help="print only this one, for --configfile=$(ssl-core recipes NAME)")
    recipes.set_defaults(command=_recipes)

    compare = commands.add_parser("compare", help="print reported numbers beside the measured ones")
    compare.set_defaults(command=_compare)

    _add_convert(commands)

    explain = commands.add_parser("explain", help="show all settings of an experiment, defaults included, and its cost")
    explain.add_argument(
        "--time",
        action=argparse.BooleanOptionalAction,
        help="measure ten steps to estimate the time of the run (default: if the data set is sharded)",
    )
    explain.set_defaults(command=_explain)

    views = commands.add_parser("views", help="draw the views of the networks, without training")
    views.add_argument("--output", type=Path, default=Path("views.png"), metavar="PNG", help="default: views.png")
    views.set_defaults(command=_views)

    for look in (explain, views):
        look.add_argument("experiment", help="its name in config.yaml; also one that a sweep or seeds make")
        look.add_argument(
            "--threads", type=_positive, default=num_cores(), help="processor threads (default: all cores)"
        )
    for look in (compare, explain, views):
        look.add_argument(
            "--configfile", type=Path, nargs="+", default=[], metavar="YAML", help="files laid over config.yaml"
        )

    doctor = commands.add_parser("doctor", help="test the capabilities of this machine, one line each")
    doctor.set_defaults(command=_doctor)

    ui = commands.add_parser("ui", help="show the runs in MLflow; prints the address of the leaderboard")
    ui.add_argument("--port", type=_positive, default=5000, help="default: 5000")
    ui.set_defaults(command=_ui)

    merge = commands.add_parser("merge-tracking", help="write the runs that jobs of a cluster recorded into MLflow")
    merge.set_defaults(command=_merge_tracking)

    completion = commands.add_parser("completion", help="print a script that completes commands in bash and zsh")
    completion.set_defaults(command=lambda options: print(terminal.completion(commands.choices)))

    schema = commands.add_parser("schema", help="print the schema of config.yaml")
    schema.set_defaults(command=_schema)


def _add_uses(commands: Any) -> None:
    """Add the commands that use a trained network."""

    def add(name: str, description: str, subject: str, subject_help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(command=_use)
        command.add_argument(subject, type=Path, help=subject_help)
        network = "a folder such as results/<experiment>, or a backbone.safetensors"
        command.add_argument("--network", type=Path, required=True, help=network)
        command.add_argument("--skip-unreadable", action="store_true", help="name and count unreadable images, go on")
        threads = {"type": _positive, "default": num_cores()}
        command.add_argument("--threads", **threads, help="processor threads (default: all cores)")
        return command

    images = "a folder, for all images below it, sorted by name; or one image"
    embed = add("embed", "write the features of images", "folder", images)
    output = "a new file that ends in .parquet or .npz, with the names and the features"
    embed.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=output)
    neighbours = add("neighbours", "print the images most similar to one image", "image", "an image file")
    among = f"{images}, or a file by embed"
    neighbours.add_argument("--in", dest="among", type=Path, required=True, metavar="FOLDER or FILE", help=among)
    neighbours.add_argument("-k", type=_positive, default=10, help="number of images (default: 10)")

    predict = add("predict", "print the class of images by a fine-tuned network", "folder", images)
    output = "a new CSV file (default: print it)"
    predict.add_argument("-o", "--output", type=Path, metavar="FILE", help=output)
    for command in (embed, predict):
        command.add_argument("--force", action="store_true", help="replace the output file")


def _use(options: argparse.Namespace) -> None:
    """Call the function of a command with its options, which have the names of its arguments."""
    from ssl_core.inference import commands

    functions = {
        "embed": commands.write_embeddings,
        "neighbours": commands.print_neighbours,
        "predict": commands.write_predictions,
    }
    arguments = dict(vars(options))
    for name in ("command", "name", "log"):
        del arguments[name]
    functions[options.name](**arguments)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="convert a public checkpoint to a backbone file with projector")
    convert.add_argument("checkpoint", type=Path, help="by torch.save; only tensors and plain containers are read")
    convert.add_argument("--layout", required=True, choices=LAYOUTS, help="the authors' names of tensors")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    convert.add_argument("--backbone", default="resnet50", metavar="NAME", help="its network (default: resnet50)")
    convert.add_argument("--stem", default="imagenet", choices=("imagenet", "tiny", "small"))
    convert.add_argument("--image-size", type=_positive, default=224, metavar="PIXELS", help="default: 224")
    convert.add_argument("--backbone-only", action="store_true", help="leave out the projector")
    convert.add_argument("--force", action="store_true", help="replace an existing file")
    convert.set_defaults(command=_convert)


def _stage(options: argparse.Namespace) -> None:
    """Call the stage with its options, which have the names of its arguments."""
    processes.end_with_workflow()
    _check_gpus()
    stage = importlib.import_module(f"ssl_core.stages.{options.name.replace('-', '_')}")
    arguments = dict(vars(options))
    for name in ("command", "name", "log"):
        del arguments[name]
    if os.environ.get("SSL_SHARDS"):
        _run_with_remote_shards(stage, options.name, arguments)
    else:
        stage.run(**arguments)


def _run_with_remote_shards(stage: ModuleType, name: str, arguments: dict[str, Any]) -> None:
    """Call a stage while the shards that it reads are on local disk; the stage `shard` is followed by the upload."""
    from ssl_core.data import remote_shards

    if name == "shard":
        card, output = arguments["card"], arguments["output"]
        if not remote_shards.fetch_manifest(card, output):
            stage.run(**arguments)
            remote_shards.upload(card, output)
    elif hasattr(stage, "splits"):  # it reads shards
        with remote_shards.local_shards(arguments["manifest"], stage.splits(arguments)) as manifest:
            stage.run(**{**arguments, "manifest": manifest})
    else:
        stage.run(**arguments)


def _check_gpus() -> None:
    """Raise ValueError if torch cannot use the GPUs that SLURM gave this job: on the processor it would take days."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if given == 0:
        return
    import torch

    usable = torch.cuda.device_count()
    if usable < given:
        node = os.environ.get("SLURMD_NODENAME", "this node")
        raise ValueError(
            f"SLURM gave this job {given} GPU(s), torch can use {usable} on {node}: run `nvidia-smi` there and exclude "
            "the node (--slurm-exclude-failed-nodes), or train without GPU (--set-resources RULE:gpu=0)"
        )


def _init(options: argparse.Namespace) -> None:
    from ssl_core.experiments import user_folder

    for path in user_folder.create(options.folder):
        print(f"wrote {path}")
    print(f"next: cd {shlex.quote(str(options.folder))} && snakemake --cores all results/ressl_r18/knn.json")


def _recipes(options: argparse.Namespace) -> None:
    from ssl_core.experiments import bundled

    if options.recipe:
        print(bundled.recipe_path(options.recipe))
    else:
        print(*sorted(bundled.RECIPES.glob("*.yaml")), sep="\n")


def _compare(options: argparse.Namespace) -> None:
    from ssl_core.experiments.overlays import load_configuration
    from ssl_core.look import compare

    print(compare.run(load_configuration(options.configfile).settings, Path("results")))


def _schema(options: argparse.Namespace) -> None:
    from ssl_core.look import schema_generation

    print(json.dumps(schema_generation.generate(), indent=2))


def _find_experiment(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for an unknown experiment before torch is imported, which takes seconds."""
    from ssl_core.experiments.overlays import load_configuration

    load_configuration(options.configfile).experiment(options.experiment)


def _convert(options: argparse.Namespace) -> None:
    from ssl_core.config import Backbone
    from ssl_core.networks.conversion import convert

    description = convert(
        options.checkpoint,
        layout=options.layout,
        output=options.output,
        backbone=Backbone(name=options.backbone, stem=options.stem),
        image_size=options.image_size,
        backbone_only=options.backbone_only,
        force=options.force,
    )
    print(f"{options.checkpoint}: {description}")


def _explain(options: argparse.Namespace) -> None:
    _find_experiment(options)
    from ssl_core.look.explain import explain

    explain(options.experiment, options.configfile, timed=options.time, threads=options.threads)


def _views(options: argparse.Namespace) -> None:
    _find_experiment(options)
    from ssl_core.look.preview import draw

    print(draw(options.experiment, options.configfile, options.output, threads=options.threads))


def _doctor(options: argparse.Namespace) -> None:
    from ssl_core.look.doctor import examine

    if not examine():
        raise SystemExit(1)


def _ui(options: argparse.Namespace) -> None:
    from ssl_core.tracking import ui

    ui.serve(options.port)


def _merge_tracking(options: argparse.Namespace) -> None:
    from ssl_core.tracking import run

    for path in run.merge():
        print(f"merged {path}")


def _card(text: str) -> Path:
    """Return the file of a card that is given by its path or by the data set's name."""
    from ssl_core.experiments import bundled

    return Path(text) if text.endswith(".yaml") else bundled.card_path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text!r}")
    return int(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None


@contextmanager
def _logged(path: Path | None) -> Iterator["_Log | None"]:
    """Copy the printed lines into a file, while a progress line can still overwrite itself on the terminal."""
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
    """A text file without errors: a full disk loses lines of the log, but never ends a run."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write at once; characters that UTF-8 does not have are escaped."""
        with suppress(OSError):
            self._file.write(text.encode("utf-8", "backslashreplace"))


class _Copied:
    """A stream that copies finished lines to a log, without the text that a progress line overwrote."""

    def __init__(self, stream: TextIO, log: _Log) -> None:
        self._stream = stream
        self._log = log
        self._line = ""

    def write(self, text: str) -> int:
        """Write to both."""
        *lines, self._line = (self._line + text).split("\n")
        self._log.write("".join(f"{_visible(line)}\n" for line in lines))
        return self._stream.write(text)

    def finish(self) -> None:
        """Copy a last line without a newline."""
        self._log.write(_visible(self._line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _visible(line: str) -> str:
    """Return the part of a line that its carriage returns leave visible, without colours."""
    return re.sub(r"\x1b\[\d+m", "", line.rstrip("\r").rsplit("\r", 1)[-1])
