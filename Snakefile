# Pre-train small networks without labels and measure them: shard -> pretrain -> evaluate -> table.
# config.yaml selects what runs; `snakemake --cores all -n` lists the jobs that would run, with the reasons.
# `ssl-core init` makes a folder of your own whose Snakefile imports this one as a module.
import shutil
from pathlib import Path

from ssl_core.experiments import bundled


# With `--directory` the configuration of that folder is used, if there is one.
configfile: "config.yaml" if Path("config.yaml").exists() else str(bundled.CONFIG)


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/shard.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/pictures.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/should_i_pretrain.smk"


# One job at a time uses the GPU of this machine, unless `--resources gpu=N` or a profile allows more. Without a GPU (its
# driver brings the tool) jobs run on the processor, and their threads limit their number. A job of a cluster has its own.
if "gpu" not in workflow.global_resources and shutil.which("nvidia-smi") and not workflow.remote_exec:
    workflow.register_resource("gpu", 1)


localrules:
    all,
    all_evaluations,


rule all:
    input:
        results_of(WRITTEN),
        pictures_of(WRITTEN),
        "results/table.csv",


# Also the sweeps, the figures and the exports.
rule all_evaluations:
    input:
        results_of(EXPERIMENTS),
        pictures_of(EXPERIMENTS),
        [f"results/{experiment}/export/README.md" for experiment in EXPERIMENTS],
        [f"results/sweeps/{sweep}.csv" for sweep in SWEEPS],
        [f"results/figures/{figure}.svg" for figure in FIGURES],
        "results/table.csv",
