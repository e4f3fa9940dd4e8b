# Pre-train small networks without labels and measure them: shard -> pretrain -> evaluate -> table.
# What runs stands in config.yaml; `snakemake --cores all -n` says what would run again, and why.
import sys

# Where pandas is installed Snakemake imports it, to see whether a parameter is a table; ours never are. Saves half a
# dry run's time.
sys.modules.setdefault("pandas", None)


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/shard.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/pictures.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/report.smk"


# A GPU is used by one job at a time, unless --resources or a profile says that there are more.
if "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", 1)


localrules:
    all,
    all_evaluations,


rule all:
    input:
        results_of(WRITTEN),
        curves_of(WRITTEN),
        pictures_of(WRITTEN),
        "results/table.csv",


# Also the sweeps, and what each experiment is passed on as.
rule all_evaluations:
    input:
        results_of(EXPERIMENTS),
        curves_of(EXPERIMENTS),
        pictures_of(EXPERIMENTS),
        [f"results/{experiment}/export/README.md" for experiment in EXPERIMENTS],
        [f"results/sweeps/{sweep}.csv" for sweep in SWEEPS],
        "results/table.csv",
