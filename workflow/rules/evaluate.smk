# Protocols with other inputs or outputs name another rule in their contract: see pictures.smk and export.smk.
rule evaluate:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        model=model_of,
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        json="results/{experiment}/{evaluation}.json",
    log:
        "logs/evaluate/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("evaluate")),
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
        " --backbone {input.backbone:q} --model {input.model:q} --manifest {input.manifest:q} --output {output.json:q}"
        " --threads {threads} --log {log:q}"


# checkpoints/<experiment>/<evaluation>.pt is not declared as an output, as in rule pretrain.
rule detect:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        json="results/{experiment}/{evaluation}.json",
        picture=report(
            "results/{experiment}/{evaluation}/detections.png",
            caption="../report/detections.rst",
            category="Pictures",
            labels={"experiment": "{experiment}", "evaluation": "{evaluation}", "what": "detections"},
        ),
    log:
        "logs/detect/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("detect")),
    threads: 16
    resources:
        gpu=lambda wildcards: evaluate_spec(wildcards).get("gpus", 1),
        runtime=23 * 60,
        mem_mb=64000,
    params:
        spec=lambda wildcards: canonical(evaluate_spec(wildcards)),
        code=lambda wildcards: detection_code(evaluate_spec(wildcards)),
    shell:
        "ssl-core detect {wildcards.experiment:q} {wildcards.evaluation:q} --spec {params.spec:q} --code {params.code}"
        " --backbone {input.backbone:q} --manifest {input.manifest:q} --output {output.json:q}"
        " --picture {output.picture:q}"
        " --checkpoint checkpoints/{wildcards.experiment:q}/{wildcards.evaluation:q}.pt --threads {threads} --log {log:q}"


# Keeps the fine-tuned network; the checkpoint is not declared as an output, as in rule pretrain.
rule finetune:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        model=model_of,
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        json="results/{experiment}/{evaluation}.json",
        backbone="results/{experiment}/{evaluation}/backbone.safetensors",
        classifier="results/{experiment}/{evaluation}/classifier.safetensors",
        cost="results/{experiment}/{evaluation}/cost.json",
    log:
        "logs/finetune/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("finetune")),
    threads: 16
    resources:
        gpu=1,
        runtime=12 * 60,
        mem_mb=32000,
    params:
        spec=lambda wildcards: canonical(evaluate_spec(wildcards)),
        code=lambda wildcards: finetuning_code(evaluate_spec(wildcards)),
    shell:
        "ssl-core finetune {wildcards.experiment:q} {wildcards.evaluation:q} --spec {params.spec:q} --code {params.code}"
        " --backbone {input.backbone:q} --model {input.model:q} --manifest {input.manifest:q} --output {output.json:q}"
        " --checkpoint checkpoints/{wildcards.experiment:q}/{wildcards.evaluation:q}.pt --threads {threads} --log {log:q}"
