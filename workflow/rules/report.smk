localrules:
    table,
    sweep,


rule table:
    input:
        results_of(config["experiments"]) if EVALUATIONS else [],
    output:
        csv="results/table.csv",
        html=report("results/table.html", caption="../report/table.rst", category="Results"),
    log:
        "logs/table.log",
    params:
        code=lambda wildcards: code_digest("ssl_core.stages.table"),
    shell:
        "ssl-core table {input} --output {output.csv} --log {log}"


rule sweep:
    input:
        lambda wildcards: results_of(schema.expand(wildcards.sweep, config)) if EVALUATIONS else [],
    output:
        csv="results/sweeps/{sweep}.csv",
        html=report(
            "results/sweeps/{sweep}.html",
            caption="../report/table.rst",
            category="Sweeps",
            labels={"sweep": "{sweep}"},
        ),
    log:
        "logs/sweeps/{sweep}.log",
    params:
        grid=lambda wildcards: canonical(schema.points(wildcards.sweep, config)),
        code=lambda wildcards: code_digest("ssl_core.stages.table"),
    shell:
        "ssl-core table {input} --grid {params.grid:q} --output {output.csv} --log {log}"
