# The card of the data set is a parameter, as in rule shard.
rule export:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        results=[
            f"results/{{experiment}}/{evaluation}.json"
            for evaluation in EVALUATIONS
            if evaluation not in evaluations_of("cost")
        ],
    output:
        weights="results/{experiment}/export/backbone.safetensors",
        onnx="results/{experiment}/export/backbone.onnx",
        card="results/{experiment}/export/README.md",
    log:
        "logs/export/{experiment}.log",
    threads: 16
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        code=lambda wildcards: export_code(pretrain_spec(wildcards)),
        dataset=lambda wildcards: pretrain_spec(wildcards)["dataset"]["name"],
        content=lambda wildcards: canonical(card_content(pretrain_spec(wildcards)["dataset"]["name"])),
        folder=lambda wildcards, output: str(Path(output.card).parent),
    shell:
        "ssl-core export {wildcards.experiment:q} --spec {params.spec:q} --backbone {input.backbone:q}"
        " --card {params.dataset:q} --results {input.results:q} --output {params.folder:q} --threads {threads} --log {log:q}"


rule export_classifier:
    input:
        backbone="results/{experiment}/{evaluation}/backbone.safetensors",
        classifier="results/{experiment}/{evaluation}/classifier.safetensors",
    output:
        "results/{experiment}/{evaluation}/classifier.onnx",
    log:
        "logs/export_classifier/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("finetune")),
    threads: 16
    params:
        code=lambda wildcards: stage_code("export_classifier"),
    shell:
        "ssl-core export-classifier {wildcards.experiment:q} {wildcards.evaluation:q} --backbone {input.backbone:q}"
        " --classifier {input.classifier:q} --output {output:q} --threads {threads} --log {log:q}"


# Timings differ from run to run: only the table may have this result as an input. The job takes all threads, so that no
# other job disturbs the timing.
rule cost:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        onnx="results/{experiment}/export/backbone.onnx",
        pretrain=lambda wildcards: (
            [] if wildcards.experiment in ADOPTED else f"results/{wildcards.experiment}/pretrain.json"
        ),
    output:
        json="results/{experiment}/{evaluation}.json",
    log:
        "logs/cost/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("cost")),
    threads: 16
    params:
        spec=lambda wildcards: canonical(evaluate_spec(wildcards)),
        code=lambda wildcards: stage_code("cost"),
        pretrain=lambda wildcards, input: ["--pretrain", input.pretrain] if input.pretrain else [],
    shell:
        "ssl-core cost {wildcards.experiment:q} {wildcards.evaluation:q} --spec {params.spec:q} --code {params.code}"
        " --backbone {input.backbone:q} --onnx {input.onnx:q} {params.pretrain:q} --output {output.json:q} --log {log:q}"
