localrules:
    should_i_pretrain,


# The page of recipes/should_i_pretrain.yaml. Of all evaluations of its experiments it needs those of equal seeds.
rule should_i_pretrain:
    input:
        results=lambda wildcards: compared("results/{}/{}.json"),
        tunings=lambda wildcards: compared("results/{}/{}/cost.json"),
        pretrainings=lambda wildcards: [
            f"results/{experiment}/pretrain.json" for experiment in should_i_pretrain.pretrainings(CONFIG)
        ],
    output:
        html=report("results/should_i_pretrain.html", caption="../report/should_i_pretrain.rst", category="Results"),
    log:
        "logs/should_i_pretrain.log",
    params:
        plan=lambda wildcards: canonical(should_i_pretrain.plan(CONFIG)),
        code=lambda wildcards: stage_code("should_i_pretrain"),
    shell:
        "ssl-core should-i-pretrain {input.results:q} --tunings {input.tunings:q} --pretrainings {input.pretrainings:q}"
        " --plan {params.plan:q} --output {output.html:q} --log {log:q}"
