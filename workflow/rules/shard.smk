# The card is a parameter, not an input: its content decides whether to run, not its place nor the date of a checkout.
rule shard:
    output:
        manifest="shards/{dataset}/manifest.json",
    log:
        "logs/shard/{dataset}.log",
    threads: 16
    resources:
        runtime=12 * 60,
        mem_mb=32000,
    params:
        content=lambda wildcards: canonical(card_content(wildcards.dataset)),
        code=lambda wildcards: stage_code("shard", card_content(wildcards.dataset)),
        folder=lambda wildcards, output: str(Path(output.manifest).parent),
    shell:
        "ssl-core shard {wildcards.dataset:q} --output {params.folder:q} --threads {threads} --log {log:q}"
