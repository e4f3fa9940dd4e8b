# The checked configuration, and what the rules ask of it. Torch-free, so that a dry run is quick.
import json
import os
import re
import shutil
import sys
from pathlib import Path

import yaml
from snakemake.scheduling.job_scheduler import JobScheduler

from ssl_core.experiments import checks, needs, overlays
from ssl_core.data.card import load_card
from ssl_core.experiments.code import evaluation_code, export_code, pretraining_code, stage_code, views_code
from ssl_core.provenance import canonical

# Where no environment is activated, jobs find `ssl-core` beside the Python that runs Snakemake.
os.environ.update(PATH=os.pathsep.join([*os.get_exec_path(), str(Path(sys.executable).parent)]))


# Snakemake before 9.17 books no cores and no GPU for a job that is the only one ready, yet hands its share back at the
# end: after the first sharding a machine would seem to have twice what it has (docs/decisions, 8).
def book_lone_job(self, jobs, select=JobScheduler.job_selector):
    selected = select(self, jobs)
    if len(jobs) == 1:
        with self._lock:
            self.update_available_resources(selected)
    return selected


if JobScheduler.job_selector.__name__ == "job_selector":
    JobScheduler.job_selector = book_lone_job


def checked(config):
    """Return all experiments of a valid configuration, sweeps included; an invalid one ends here with one line."""
    try:
        overlays.check_config_files(workflow.configfiles)
        checks.check(config, SCHEMA, [path.stem for path in Path("datasets").glob("*.yaml")])
        checks.check_targets(config, sys.argv[1:])
        checks.check_files(config, sys.argv[1:])
        labels = {name: load_card(Path(f"datasets/{name}.yaml")).labels for name in checks.datasets(config)}
        needs.check_needs(config, SCHEMA, labels, sys.argv[1:])
        return checks.experiments(config)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def pretrain_spec(wildcards):
    """Return the experiment's own section."""
    return EXPERIMENTS[wildcards.experiment]


def evaluate_spec(wildcards):
    """Return the evaluation's own section; without a data set of its own it takes the labelled images of the experiment's."""
    dataset = {"name": pretrain_spec(wildcards)["dataset"]["name"]}
    return {"dataset": dataset, **EVALUATIONS[wildcards.evaluation]}


def files_of(wildcards):
    """Return the files of weights that the experiment names: a change of one runs it again."""
    return list(checks.files(pretrain_spec(wildcards)).values())


def model_of(wildcards):
    """Return the whole pre-trained model for evaluations that need its projector, else nothing."""
    section = EVALUATIONS[wildcards.evaluation]
    if not CONTRACTS[section["protocol"]].needs_of(section).projector:
        return []
    return [f"results/{wildcards.experiment}/model.safetensors"]


def card_of(spec):
    """Return the card of the data set that a stage's section names."""
    return f"datasets/{spec['dataset']['name']}.yaml"


def manifest_of(spec):
    """Return the manifest of the data set that a stage's section names."""
    return f"shards/{spec['dataset']['name']}/manifest.json"


def results_of(experiments):
    """Return the results of all evaluations of these experiments, or their weights where nothing evaluates them."""
    if not EVALUATIONS:
        return [f"results/{experiment}/backbone.safetensors" for experiment in experiments]
    return [f"results/{experiment}/{evaluation}.json" for experiment in experiments for evaluation in EVALUATIONS]


def pictures_of(experiments):
    """Return the pictures of these experiments: views and curves of what was trained here, and drawn evaluations."""
    trained = [experiment for experiment in experiments if experiment not in ADOPTED]
    own = [f"results/{experiment}/{picture}.png" for experiment in trained for picture in ("views", "curves")]
    drawn = evaluations_of("pictures")  # one job draws all pictures of an evaluation
    return own + [f"results/{name}/{evaluation}/tsne.png" for name in experiments for evaluation in drawn]


def one_of(names):
    """Return a regular expression that matches exactly these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def evaluations_of(rule):
    """Return the evaluations whose protocol this rule runs."""
    return [name for name, section in EVALUATIONS.items() if CONTRACTS[section["protocol"]].rule == rule]


SCHEMA = json.loads(Path(workflow.basedir, "workflow/schemas/config.schema.json").read_text())
CONTRACTS = needs.contracts(SCHEMA)
CONFIG = checks.without_nulls(config)
EXPERIMENTS = checked(CONFIG)
ADOPTED = [experiment for experiment, section in EXPERIMENTS.items() if "weights" in section]
WRITTEN = checks.written(CONFIG)  # all but the sweeps', which run when asked for
EVALUATIONS = CONFIG.get("evaluations") or {}
SWEEPS = CONFIG.get("sweeps") or {}
# A machine without one (its driver brings the tool) trains on its processor, where threads say how many jobs fit.
GPU = int(shutil.which("nvidia-smi") is not None)


wildcard_constraints:
    experiment=one_of(EXPERIMENTS),
    evaluation=one_of(EVALUATIONS),
    sweep=one_of(SWEEPS),
