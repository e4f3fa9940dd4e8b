# The card of the data set is a parameter, as in rule shard.
rule export:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        results=lambda wildcards: measured(wildcards.experiment),
    output:
        weights="results/{experiment}/export/backbone.safetensors",
        onnx="results/{experiment}/export/backbone.onnx",
        config="results/{experiment}/export/config.json",
        card="results/{experiment}/export/README.md",
    log:
        "logs/export/{experiment}.log",
    threads: 16
    params:
        spec=lambda wildcards: canonical(pretrain_spec(wildcards)),
        options=canonical(CONFIG.get("export") or {}),
        code=lambda wildcards: export_code(pretrain_spec(wildcards)),
        dataset=lambda wildcards: pretrain_spec(wildcards)["dataset"]["name"],
        content=lambda wildcards: canonical(card_content(pretrain_spec(wildcards)["dataset"]["name"])),
        folder=lambda wildcards, output: str(Path(output.card).parent),
    shell:
        "ssl-core export {wildcards.experiment:q} --spec {params.spec:q} --options {params.options:q}"
        " --backbone {input.backbone:q} --card {params.dataset:q} --results {input.results:q} --output {params.folder:q} --threads {threads} --log {log:q}"


# Calibrated on the images of the pre-training. The calibration runs on all cores.
rule quantise:
    input:
        onnx="results/{experiment}/export/backbone.onnx",
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
    output:
        "results/{experiment}/export/backbone.int8.onnx",
    log:
        "logs/quantise/{experiment}.log",
    threads: 16
    params:
        spec=canonical(CONFIG.get("quantise") or {}),
        dataset=lambda wildcards: canonical(pretrain_spec(wildcards)["dataset"]),
        code=lambda wildcards: stage_code("quantise"),
    shell:
        "ssl-core quantise {wildcards.experiment:q} --spec {params.spec:q} --dataset {params.dataset:q}"
        " --onnx {input.onnx:q} --manifest {input.manifest:q} --output {output:q} --log {log:q}"


# For the runtimes of phones. Their packages are not in requirements.lock.
rule export_device:
    input:
        backbone="results/{experiment}/backbone.safetensors",
    output:
        "results/{experiment}/export/backbone.{format}",
    log:
        "logs/export_device/{experiment}.{format}.log",
    wildcard_constraints:
        format="tflite|pte",
    threads: 16
    params:
        options=canonical(CONFIG.get("export") or {}),
        code=lambda wildcards: stage_code("export_device"),
    shell:
        "ssl-core export-device {wildcards.experiment:q} --options {params.options:q} --backbone {input.backbone:q}"
        " --output {output:q} --threads {threads} --log {log:q}"


# Calibrated as in rule quantise.
rule quantise_device:
    input:
        backbone="results/{experiment}/backbone.safetensors",
        manifest=lambda wildcards: manifest_of(pretrain_spec(wildcards)),
    output:
        "results/{experiment}/export/backbone.int8.{format}",
    log:
        "logs/quantise_device/{experiment}.{format}.log",
    wildcard_constraints:
        format="tflite|pte",
    threads: 16
    params:
        spec=canonical(CONFIG.get("quantise") or {}),
        options=canonical(CONFIG.get("export") or {}),
        dataset=lambda wildcards: canonical(pretrain_spec(wildcards)["dataset"]),
        code=lambda wildcards: stage_code("quantise_device"),
    shell:
        "ssl-core quantise-device {wildcards.experiment:q} --spec {params.spec:q} --options {params.options:q}"
        " --dataset {params.dataset:q} --backbone {input.backbone:q} --manifest {input.manifest:q} --output {output:q}"
        " --threads {threads} --log {log:q}"


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


# Calibrated on the images of the fine-tuning, labelled or not.
use rule quantise as quantise_classifier with:
    input:
        onnx="results/{experiment}/{evaluation}/classifier.onnx",
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        "results/{experiment}/{evaluation}/classifier.int8.onnx",
    log:
        "logs/quantise_classifier/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("finetune")),
    params:
        spec=canonical(CONFIG.get("quantise") or {}),
        dataset=lambda wildcards: canonical(evaluate_spec(wildcards)["dataset"]),
        code=lambda wildcards: stage_code("quantise"),


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


# Timed as in rule cost.
rule quantised:
    input:
        float32=lambda wildcards: f"results/{{experiment}}/export/backbone.{format_of(wildcards)}",
        int8=lambda wildcards: f"results/{{experiment}}/export/backbone.int8.{format_of(wildcards)}",
        manifest=lambda wildcards: manifest_of(evaluate_spec(wildcards)),
    output:
        json="results/{experiment}/{evaluation}.json",
    log:
        "logs/quantised/{experiment}/{evaluation}.log",
    wildcard_constraints:
        evaluation=one_of(evaluations_of("quantised")),
    threads: 16
    params:
        spec=lambda wildcards: canonical(evaluate_spec(wildcards)),
        code=lambda wildcards: stage_code("quantised"),
    shell:
        "ssl-core quantised {wildcards.experiment:q} {wildcards.evaluation:q} --spec {params.spec:q} --code {params.code}"
        " --float32 {input.float32:q} --int8 {input.int8:q} --manifest {input.manifest:q} --output {output.json:q} --log {log:q}"
