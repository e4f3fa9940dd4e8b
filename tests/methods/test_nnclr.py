import torch
import torch.nn.functional as F

from ssl_core.methods.nnclr import NNCLR, Config
from tests.methods.harness import START, batch, make, remember


def test_the_loss_by_brute_force():
    config = Config(temperature=0.3, queue_size=8, projector_hidden=12, predictor_hidden=7, embedding_dim=5)
    model, one = make(NNCLR, config).eval(), batch(NNCLR.views(config, 8))
    remember(model, model(batch(NNCLR.views(config, 8), seed=1), START))
    z = [model.projector(model.backbone(one.views[group][0])) for group in ("first", "second")]
    p = [F.normalize(model.predictor(rows), dim=1) for rows in z]
    losses = []
    for embeddings, predictions in ((z[0], p[1]), (z[1], p[0])):
        for index, row in enumerate(embeddings):
            neighbour = max(model.queue.rows, key=lambda other: torch.cosine_similarity(row, other, dim=0).item())
            logits = torch.stack([neighbour @ prediction for prediction in predictions]) / 0.3
            losses.append(logits.logsumexp(0) - logits[index])
    assert torch.allclose(model(one, START).total, torch.stack(losses).mean(), atol=1e-6)
