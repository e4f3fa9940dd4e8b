localrules:
    keep,


# checkpoints/<experiment>.pt is not declared as an output: Snakemake deletes the outputs of an interrupted job.
rule pretrain:
    input:
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
        weights=files_of,
        bags=bags_of,
    output:
        backbone="results/{experiment}/backbone.safetensors",
        model="results/{experiment}/model.safetensors",
        summary="results/{experiment}/pretrain.json",
        history="results/{experiment}/history.csv",
    log:
        "logs/pretrain/{experiment}.log",
    wildcard_constraints:
        experiment=one_of([experiment for experiment in EXPERIMENTS if experiment not in ADOPTED]),
    threads: 16
    resources:
        gpu=pretraining_gpus,
        gres=pretraining_gres,
        nodes=pretraining_nodes,
        runtime=23 * 60,
        mem_mb=64000,
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        code=lambda wildcards: pretraining_code(pretrain_spec(wildcards)),
        folder=lambda wildcards, output: str(Path(output.backbone).parent),
    shell:
        "ssl-core pretrain {wildcards.experiment:q} --spec {params.spec:q} --code {params.code}"
        " --manifest {input.manifest:q} --output {params.folder:q}"
        " --checkpoint checkpoints/{wildcards.experiment:q}.pt --threads {threads} --log {log:q}"


# The neighbours of each image by the teacher, which the pre-training reads from the folder of its outputs.
rule bags:
    input:
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
        weights=lambda wildcards: bags_spec(wildcards)["method"]["teacher"]["weights"],
    output:
        "results/{experiment}/bags.npy",
    log:
        "logs/bags/{experiment}.log",
    wildcard_constraints:
        experiment=one_of(BAGGED),
    threads: 16
    resources:
        gpu=1,
        runtime=12 * 60,
        mem_mb=32000,
    params:
        spec=lambda wildcards: canonical(bags_spec(wildcards)),
        code=lambda wildcards: stage_code("bags", bags_spec(wildcards)),
    shell:
        "ssl-core bags {wildcards.experiment:q} --spec {params.spec:q} --manifest {input.manifest:q} --output {output:q}"
        " --threads {threads} --log {log:q}"


# The pre-training leaves the backbones of `training.keep_epochs` in kept/, as no declared outputs: their names depend on
# the experiment.
rule keep:
    input:
        backbone="results/{experiment}/backbone.safetensors",
    output:
        "results/{experiment}/epoch-{epoch}.safetensors",
    log:
        "logs/keep/{experiment}/{epoch}.log",
    wildcard_constraints:
        experiment=one_of([experiment for experiment in EXPERIMENTS if experiment not in ADOPTED]),
        epoch=r"\d+",
    shell:
        "cp results/{wildcards.experiment:q}/kept/epoch-{wildcards.epoch}.safetensors {output:q} 2> {log:q}"


# In place of pre-training: makes a backbone of weights that were trained elsewhere.
rule adopt:
    input:
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
        weights=files_of,
    output:
        backbone="results/{experiment}/backbone.safetensors",
    log:
        "logs/adopt/{experiment}.log",
    wildcard_constraints:
        experiment=one_of(ADOPTED),
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        code=lambda wildcards: stage_code("adopt", pretrain_spec(wildcards)),
    shell:
        "ssl-core adopt {wildcards.experiment:q} --spec {params.spec:q} --code {params.code}"
        " --manifest {input.manifest:q} --output {output.backbone:q} --log {log:q}"
