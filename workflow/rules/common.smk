# The checked configuration, and the functions that rules take inputs and parameters from. Torch-free, so that a dry run
# is quick.
import atexit
import gc
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

import yaml
from snakemake import common
from snakemake import rules as snakemake_rules
from snakemake.dag import DAG
from snakemake.persistence import Persistence
from snakemake.scheduling.job_scheduler import JobScheduler

PROJECT = Path(workflow.current_basedir).resolve().parents[1]


def package_of_jobs():
    """Return the folder of the `ssl_core` that jobs import: Snakemake adds the project's folder to its own path only."""
    path, inherited = list(sys.path), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != PROJECT or folder in inherited]
    try:
        specs = [finder.find_spec("ssl_core", None) for finder in sys.meta_path]
    finally:
        sys.path[:] = path
    origins = [spec.origin for spec in specs if spec is not None and spec.origin]
    return Path(origins[0]).resolve().parent if origins else PROJECT / "ssl_core"


# Before anything else is imported of a package that may be another version.
if (PROJECT / "ssl_core").is_dir() and package_of_jobs() != PROJECT / "ssl_core":
    other = package_of_jobs().parent
    sys.exit(f"error: the code of {other} is installed, not that of {PROJECT}: run `make install` in {PROJECT}")

from ssl_core.experiments import (
    bundled,
    checks,
    failures,
    figures,
    needs,
    overlays,
    processes,
    should_i_pretrain,
    sweeps,
)
from ssl_core.data.card import load_card
from ssl_core.experiments.code import (
    detection_code,
    evaluation_code,
    export_code,
    finetuning_code,
    pretraining_code,
    stage_code,
    views_code,
)
from ssl_core.provenance import canonical

# Where no environment is activated, jobs find `ssl-core` beside the Python that runs Snakemake.
os.environ.update(PATH=os.pathsep.join([*os.get_exec_path(), str(Path(sys.executable).parent)]))

# Stages end with this process, also after a kill -9, so that none is left beside those of the next run.
processes.announce_workflow()

# After a kill the same command continues: without `--unlock` and, below, without `--rerun-incomplete`.
processes.remove_stale_locks(Path(".snakemake"))


async def make_incomplete_files_again(self):
    if not self.ignore_incomplete:
        self.forcefiles.update(await self.incomplete_files())


DAG.check_incomplete = make_incomplete_files_again


# Snakemake before 9.17 reserves no cores and no GPU for a job that is the only one ready, yet releases them at its end:
# after the first sharding it would start twice as many jobs as fit (docs/decisions, 8).
def reserve_lone_job(self, jobs, select=JobScheduler.job_selector):
    selected = select(self, jobs)
    if len(jobs) == 1:
        with self._lock:
            self.update_available_resources(selected)
    return selected


if JobScheduler.job_selector.__name__ == "job_selector":
    JobScheduler.job_selector = reserve_lone_job


# `--retries` is for time limits, preemption and lost nodes: a stage that ended with an error message would end with it
# again.
def retry_killed_job(self, job, postprocess_job=True, handle=JobScheduler._handle_error):
    if any(failures.error_line(Path(log)) for log in job.log or []):
        job._attempt = job.restart_times + 1  # its setter would compute the resources again
    handle(self, job, postprocess_job)


if JobScheduler._handle_error.__name__ == "_handle_error":
    JobScheduler._handle_error = retry_killed_job


# The SLURM plugin waits for a preempted job for ever; with `slurm-no-requeue` it has ended and is retried.
slurm = sys.modules.get("snakemake_executor_plugin_slurm")


async def query_with_preempted_as_cancelled(command, logger, query=slurm and slurm.query_job_status):
    states, seconds = await query(command, logger)
    if states and workflow.executor_settings.no_requeue:
        states = {job: "CANCELLED" if state == "PREEMPTED" else state for job, state in states.items()}
    return states, seconds


if slurm and slurm.query_job_status.__name__ == "query_job_status":
    slurm.query_job_status = query_with_preempted_as_cancelled


# Snakemake imports pandas, half a second, to ask whether a parameter is a table; that needs a rule that imported it.
def serialize_parameter(self, value, with_pandas=Persistence._serialize_param_pandas):
    return with_pandas(self, value) if "pandas" in sys.modules else self._serialize_param_builtin(value)


if Persistence._serialize_param_pandas.__name__ != "serialize_parameter":
    Persistence._serialize_param_pandas = serialize_parameter


# Snakemake reads the signature of an input function anew for every job.
if not hasattr(common.get_function_params, "cache_info"):
    common.get_function_params = cache(common.get_function_params)
    snakemake_rules.get_function_params = common.get_function_params

# The jobs of a large workflow are all kept, so searching them for garbage costs time and frees nothing.
gc.set_threshold(100_000, 50, 50)


def checked(config):
    """Return all experiments of a valid configuration, those of sweeps included; exit with one line if it is invalid."""
    try:
        overlays.check_config_files(workflow.configfiles)
        checks.check(config, SCHEMA, bundled.card_names())
        checks.check_targets(config, sys.argv[1:])
        checks.check_files(config, sys.argv[1:])
        checks.check_folders(config)
        names = dict.fromkeys(sweeps.datasets(config).values())
        labels = {name: load_card(bundled.card_path(name)).labels for name in names}
        needs.check_needs(config, SCHEMA, labels, sys.argv[1:])
        return sweeps.experiments(config)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def pretrain_spec(wildcards):
    """Return the experiment's settings."""
    return EXPERIMENTS[wildcards.experiment]


def evaluate_spec(wildcards):
    """Return the evaluation's settings; the default data set is the experiment's, with all its images."""
    dataset = {"name": pretrain_spec(wildcards)["dataset"]["name"]}
    return {"dataset": dataset, **EVALUATIONS[wildcards.evaluation]}


def format_of(wildcards):
    """Return the suffix of the exported files that the evaluation measures."""
    return EVALUATIONS[wildcards.evaluation].get("format", "onnx")


def files_of(wildcards):
    """Return the files of weights that the experiment starts from; when one changes, it runs again."""
    return list(sweeps.weight_files(pretrain_spec(wildcards)).values())


def bags_of(wildcards):
    """Return the bags of neighbours for experiments whose method reads them, else nothing."""
    return [f"results/{wildcards.experiment}/bags.npy"] if wildcards.experiment in BAGGED else []


def bags_spec(wildcards):
    """Return the settings of an experiment that its bags depend on."""
    section = pretrain_spec(wildcards)
    method = {key: section["method"][key] for key in ("name", "teacher", "bag_size") if key in section["method"]}
    method["teacher"] = {key: value for key, value in method["teacher"].items() if key != "projector"}
    return {"dataset": section["dataset"], "method": method}


def model_of(wildcards):
    """Return the whole pre-trained model for evaluations that need its projector, else nothing."""
    section = EVALUATIONS[wildcards.evaluation]
    if not CONTRACTS[section["protocol"]].needs_of(section).projector:
        return []
    return [f"results/{wildcards.experiment}/model.safetensors"]


def card_content(dataset):
    """Return the content of a data set's card: a change of it counts, a change of its place or date does not."""
    return yaml.safe_load(bundled.card_path(dataset).read_text())


def manifest_of(spec):
    """Return the manifest of the data set that the settings of a stage name."""
    return f"shards/{spec['dataset']['name']}/manifest.json"


def results_of(experiments):
    """Return the results of all evaluations of these experiments, or their weights if there are no evaluations."""
    if not EVALUATIONS:
        return [f"results/{experiment}/backbone.safetensors" for experiment in experiments]
    return [f"results/{name}/{evaluation}.json" for name in experiments for evaluation in evaluations_on(name)]


def evaluations_on(experiment):
    """Return the evaluations that run on an experiment: all, but for those of the page "Should I pre-train?" of other
    seeds."""
    others = should_i_pretrain.of_other_seeds(experiment, CONFIG)
    return [name for name in EVALUATIONS if name not in others]


def measured(experiment):
    """Return the results for the model card of an experiment: without those of its exported files."""
    later = evaluations_of("cost") + evaluations_of("quantised")
    return [f"results/{experiment}/{name}.json" for name in evaluations_on(experiment) if name not in later]


def compared(file):
    """Return this file of each fine-tuning that the page "Should I pre-train?" compares."""
    return [file.format(*pair) for pair in should_i_pretrain.all_pairs(CONFIG)]


def settings_of(experiments):
    """Return the files with all settings of those of these experiments that are trained here."""
    return [f"results/{experiment}/pretrain.json" for experiment in experiments if experiment not in ADOPTED]


def pictures_of(experiments):
    """Return the pictures of these experiments: views and curves of what was trained here, and drawn evaluations."""
    trained = [experiment for experiment in experiments if experiment not in ADOPTED]
    own = [f"results/{experiment}/{picture}.png" for experiment in trained for picture in ("views", "curves")]
    drawn = evaluations_of("pictures")  # one job draws all pictures of an evaluation
    return own + [f"results/{name}/{evaluation}/tsne.png" for name in experiments for evaluation in drawn]


def figure_files(wildcards):
    """Return the results that a figure is drawn from."""
    section = figures.read(FIGURES[wildcards.figure], f"figures.{wildcards.figure}")
    return [f"results/{file}" for file in section.files()]


def pretraining_gpus(wildcards):
    """Return the number of GPUs of a pre-training. Like all resources it is the same on every host that plans a job."""
    if pretraining_gres(wildcards):
        return None
    return pretrain_spec(wildcards).get("training", {}).get("gpus", 1)


def pretraining_gres(wildcards):
    """Return the GPUs of each node in SLURM's words for a pre-training on several nodes of a cluster, else nothing.

    SLURM's plugin takes `gpu` for the GPUs of all nodes and asks for as many in its step, which has one node.
    """
    if pretraining_nodes(wildcards) is None or not (workflow.non_local_exec or workflow.remote_exec):
        return None
    return f"gpu:{pretrain_spec(wildcards)['training'].get('gpus', 1)}"


def pretraining_nodes(wildcards):
    """Return the number of nodes of a pre-training on several nodes, else nothing."""
    nodes = pretrain_spec(wildcards).get("training", {}).get("nodes", 1)
    return nodes if nodes > 1 else None


def one_of(names):
    """Return a regular expression that matches exactly these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def evaluations_of(rule):
    """Return the evaluations whose protocol this rule runs."""
    return [name for name, section in EVALUATIONS.items() if CONTRACTS[section["protocol"]].rule == rule]


SCHEMA = json.loads(bundled.SCHEMA.read_text())
CONTRACTS = needs.contracts(SCHEMA)
CONFIG = overlays.without_nulls(config)
EXPERIMENTS = checked(CONFIG)
ADOPTED = [experiment for experiment, section in EXPERIMENTS.items() if "weights" in section]
BAGGED = [name for name, section in EXPERIMENTS.items() if section.get("method", {}).get("name") == "bingo"]
WRITTEN = sweeps.written_experiments(CONFIG)  # without those of sweeps, which run only as targets
EVALUATIONS = CONFIG.get("evaluations") or {}
SWEEPS = CONFIG.get("sweeps") or {}
FIGURES = CONFIG.get("figures") or {}

# Not a parameter of rules: shards that lie elsewhere are the same data.
if "shards" in CONFIG:
    os.environ.update(SSL_SHARDS=CONFIG["shards"])


# Jobs run in this image with `--sdm apptainer` (docs/configure.md#in-a-container).
container: CONFIG.get("container")


# Another image re-runs nothing, as another requirements.lock does.
def software_never_changed(self, job, file=None):
    return False


Persistence._software_stack_changed = software_never_changed


# The last lines of a run: at exit, since Snakemake prints more after these hooks.
onsuccess:
    logs = [log] if isinstance(log, str) else log
    atexit.register(failures.print_end, list(map(Path, logs)), failed=False)


onerror:
    logs = [log] if isinstance(log, str) else log
    atexit.register(failures.print_end, list(map(Path, logs)), failed=True)


wildcard_constraints:
    experiment=one_of(EXPERIMENTS),
    evaluation=one_of(EVALUATIONS),
    sweep=one_of(SWEEPS),
    figure=one_of(FIGURES),
