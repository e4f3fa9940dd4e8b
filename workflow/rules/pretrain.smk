# checkpoints/<experiment>.pt is no output on purpose: Snakemake deletes outputs of a job that was interrupted.
rule pretrain:
    input:
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
    output:
        backbone="results/{experiment}/backbone.safetensors",
        model="results/{experiment}/model.safetensors",
        summary="results/{experiment}/pretrain.json",
        history=report(
            "results/{experiment}/history.csv",
            caption="../report/history.rst",
            category="Pre-training",
            labels={"experiment": "{experiment}", "what": "history"},
        ),
        views=report(
            "results/{experiment}/views.png",
            caption="../report/views.rst",
            category="Pre-training",
            labels={"experiment": "{experiment}", "what": "views"},
        ),
    log:
        "logs/pretrain/{experiment}.log",
    threads: 16
    resources:
        gpu=GPU,
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        code=pretrain_code,
        folder=lambda wildcards, output: str(Path(output.backbone).parent),
    shell:
        "ssl-core pretrain {wildcards.experiment} --spec {params.spec:q} --code {params.code}"
        " --manifest {input.manifest} --output {params.folder}"
        " --checkpoint checkpoints/{wildcards.experiment}.pt --threads {threads} --log {log}"
