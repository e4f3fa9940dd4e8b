localrules:
    table,
    sweep,
    figure,


rule table:
    input:
        results=results_of(WRITTEN) if EVALUATIONS else [],
        settings=settings_of(WRITTEN),
        pictures=pictures_of(WRITTEN) if EVALUATIONS else [],
    output:
        csv="results/table.csv",
        html=report("results/table.html", caption="../report/table.rst", category="Results"),
    log:
        "logs/table.log",
    params:
        seeds=canonical(sweeps.seeds(CONFIG["experiments"])),
        reported=canonical(sweeps.reported(CONFIG["experiments"], CONFIG)),
        code=lambda wildcards: stage_code("table"),
    shell:
        "ssl-core table {input.results:q} --settings {input.settings:q} --pictures {input.pictures:q} --seeds {params.seeds:q} --reported {params.reported:q}"
        " --output {output.csv:q} --log {log:q}"


rule sweep:
    input:
        results=lambda wildcards: results_of(sweeps.sweep_experiments(wildcards.sweep, CONFIG)) if EVALUATIONS else [],
        settings=lambda wildcards: settings_of(sweeps.sweep_experiments(wildcards.sweep, CONFIG)),
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
        grid=lambda wildcards: canonical(sweeps.points(wildcards.sweep, CONFIG)),
        seeds=lambda wildcards: canonical(sweeps.seeds(sweeps.variants(wildcards.sweep, CONFIG))),
        reported=lambda wildcards: canonical(sweeps.reported(sweeps.variants(wildcards.sweep, CONFIG), CONFIG)),
        code=lambda wildcards: stage_code("table"),
    shell:
        "ssl-core table {input.results:q} --settings {input.settings:q} --grid {params.grid:q} --seeds {params.seeds:q} --reported {params.reported:q}"
        " --output {output.csv:q} --log {log:q}"


# A comparison of experiments, as the section `figures` describes it; only as a target.
rule figure:
    input:
        figure_files,
    output:
        svg=report(
            "results/figures/{figure}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        png="results/figures/{figure}.png",
    log:
        "logs/figures/{figure}.log",
    params:
        spec=lambda wildcards: json.dumps(FIGURES[wildcards.figure]),  # in the order of the series
        code=lambda wildcards: stage_code("figure"),
    shell:
        "ssl-core figure {wildcards.figure:q} --spec {params.spec:q} --results results --output {output.svg:q}"
        " --log {log:q}"
