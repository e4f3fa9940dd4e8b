# The card is a parameter, not an input: its content counts, not when a checkout wrote it.
rule shard:
    output:
        manifest="shards/{dataset}/manifest.json",
    log:
        "logs/shard/{dataset}.log",
    threads: 16
    params:
        card="datasets/{dataset}.yaml",
        content=lambda wildcards: canonical(yaml.safe_load(Path(f"datasets/{wildcards.dataset}.yaml").read_text())),
        code=lambda wildcards: stage_code(
            "shard", yaml.safe_load(Path(f"datasets/{wildcards.dataset}.yaml").read_text())
        ),
        folder=lambda wildcards, output: str(Path(output.manifest).parent),
    shell:
        "ssl-core shard {params.card} --output {params.folder} --threads {threads} --log {log}"
