localrules:
    draw,
    curves,


# Measures; `draw` makes the pictures, so that a change of drawing code measures nothing again.
rule pictures:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        json="results/{experiment}/{evaluation}.json",
        data="results/{experiment}/{evaluation}/pictures.npz",
    log:
        "logs/pictures/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("pictures")),
    threads: 16
    resources:
        gpu=1,
        runtime=12 * 60,
        mem_mb=32000,
    params:
        spec=lambda wildcards: canonical(evaluate_spec(wildcards)),
        code=lambda wildcards: evaluation_code(evaluate_spec(wildcards)),
    shell:
        "ssl-core evaluate {wildcards.experiment:q} {wildcards.evaluation:q} --spec {params.spec:q} --code {params.code}"
        " --backbone {input.backbone:q} --manifest {input.manifest:q} --output {output.json:q}"
        " --threads {threads} --log {log:q}"


# Each picture as PNG and SVG.
rule draw:
    input:
        data="results/{experiment}/{evaluation}/pictures.npz",
    output:
        tsne=report(
            "results/{experiment}/{evaluation}/tsne.png",
            caption="../report/tsne.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "t-SNE"},
        ),
        triangles=report(
            "results/{experiment}/{evaluation}/triangles.png",
            caption="../report/triangles.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "augmented copies"},
        ),
        neighbours=report(
            "results/{experiment}/{evaluation}/neighbours.png",
            caption="../report/neighbours.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "nearest neighbours"},
        ),
        confusion=report(
            "results/{experiment}/{evaluation}/confusion.png",
            caption="../report/confusion.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "confusion matrix"},
        ),
        spectrum=report(
            "results/{experiment}/{evaluation}/spectrum.png",
            caption="../report/spectrum.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "spectrum"},
        ),
        scalable=multiext(
            "results/{experiment}/{evaluation}/",
            "tsne.svg",
            "triangles.svg",
            "neighbours.svg",
            "confusion.svg",
            "spectrum.svg",
        ),
    log:
        "logs/draw/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("pictures")),
    params:
        code=lambda wildcards: stage_code("draw"),
        folder=lambda wildcards, output: str(Path(output.tsne).parent),
    shell:
        "ssl-core draw {wildcards.experiment:q} {wildcards.evaluation:q} --data {input.data:q} --output {params.folder:q}"
        " --log {log:q}"


# No input of a pre-training: a picture that is drawn anew trains nothing.
rule views:
    input:
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
    output:
        report(
            "results/{experiment}/views.png",
            caption="../report/views.rst",
            category="Pre-training",
            labels={"experiment": "{experiment}", "what": "views"},
        ),
    log:
        "logs/views/{experiment}.log",
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        code=lambda wildcards: views_code(pretrain_spec(wildcards)),
    shell:
        "ssl-core sample-views {wildcards.experiment:q} --spec {params.spec:q} --manifest {input.manifest:q}"
        " --output {output:q} --log {log:q}"


# Adopted weights have no history, so `rule all` requests no curves of them.
rule curves:
    input:
        history="results/{experiment}/history.csv",
    output:
        png=report(
            "results/{experiment}/curves.png",
            caption="../report/curves.rst",
            category="Pre-training",
            labels={"experiment": "{experiment}", "what": "curves"},
        ),
        svg="results/{experiment}/curves.svg",
    log:
        "logs/curves/{experiment}.log",
    params:
        code=lambda wildcards: stage_code("curves"),
    shell:
        "ssl-core curves {wildcards.experiment:q} --history {input.history:q} --output {output.png:q} --log {log:q}"
