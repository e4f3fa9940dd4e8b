"""Which evaluations get the whole pre-trained model."""

import re

from .conftest import Project


def test_only_protocols_that_use_the_projector_get_the_model(fresh: Project) -> None:
    fresh.change("evaluations/few", {"protocol": "finetune", "variant": "sslight_1"})
    fresh.change("evaluations/ressl", {"protocol": "finetune"})
    run = fresh.snakemake("-n", "-p", *(f"results/first/{name}.json" for name in ("few", "ressl", "knn")))
    assert run.returncode == 0, run.stdout + run.stderr
    models = dict(
        re.findall(r"ssl-core (?:evaluate|finetune) first (\w+) .*? --model (\S*) ?--manifest", run.stdout + run.stderr)
    )
    assert models == {"few": "results/first/model.safetensors", "ressl": "", "knn": ""}
