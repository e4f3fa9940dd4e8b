from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ssl_core.blocks.losses import info_nce
from ssl_core.config import Backbone, parse
from ssl_core.data.loader import Batch
from ssl_core.methods.moco import Config, MoCo, smoothed_info_nce
from ssl_core.networks.backbones import build_backbone, save_backbone
from tests.methods.harness import START, Tiny, batch, make, resolved, resume_is_exact, two_processes_equal_one

SMALL: dict[str, Any] = {"queue_size": 32, "projector_hidden": 12, "embedding_dim": 5, "batchnorm_splits": 1}
CROPS: dict[str, Any] = {"num_locals": 3, "local_size": 5}


def build(**changes):
    return make(MoCo, Config(**{**SMALL, **changes}))


def noise(model, seed=0, images=16):
    return batch(MoCo.views(model.config, 8), seed=seed, images=images)


def test_random_unit_vectors_start_near_log_of_queue_size():
    # docs/sources.md#worked-moco
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 128), dim=1) for n in (256, 256, 4096))
    assert abs(info_nce(query, key, queue, temperature=0.2).item() - 8.42) < 0.1


def test_smoothed_infonce_is_the_cross_entropy_to_the_codes_target():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)  # noqa: E731
    query, key, queue = draw(4), draw(4), draw(9)
    found = smoothed_info_nce(query, key, queue, temperature=0.1, smoothing=0.3, neighbours=3)
    # As light-moco's code: a target over [positive, negatives], one query at a time.
    expected = []
    for q, k in zip(query, key, strict=True):
        logits = torch.cat([(q @ k)[None], queue @ q])
        target = torch.zeros(10, dtype=torch.float64)
        target[0] = 0.7
        for index in sorted(range(1, 10), key=lambda index: -logits[index])[:3]:
            target[index] = 0.1
        expected.append(F.cross_entropy(logits[None] / 0.1, target[None]))
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_without_smoothing_it_is_infonce_and_with_it_the_method_uses_it():
    model = build(smoothing=0.2, smoothing_neighbours=4).eval()
    one = noise(model)
    losses = model(one, START)
    (key,) = losses.memory["keys"]
    arguments = (losses.embedding, key, model.queue.rows)
    for smoothing, expected in [(0.2, losses.total), (0.0, info_nce(*arguments, temperature=0.2))]:
        found = smoothed_info_nce(*arguments, temperature=0.2, smoothing=smoothing, neighbours=4)
        assert torch.allclose(found, expected)
    assert not torch.allclose(losses.total, info_nce(*arguments, temperature=0.2))


def test_neighbours_beyond_the_queue_or_without_smoothing_are_refused():
    with pytest.raises(ValueError, match=r"method: smoothing_neighbours 33 must not be above queue_size 32"):
        parse(Config, {**SMALL, "smoothing": 0.2, "smoothing_neighbours": 33}, "method")
    with pytest.raises(ValueError, match=r"method\.smoothing_neighbours has no effect here: smoothing is 0"):
        resolved("moco", smoothing_neighbours=5)


def test_the_keys_depend_on_the_second_view_only():
    model = build()
    one, other = noise(model, seed=0), noise(model, seed=1)
    mixed = Batch({"query": other.views["query"], "key": one.views["key"]}, one.labels, one.indices)
    first, second = (model(each, START).memory["keys"] for each in (one, mixed))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_symmetric_adds_or_averages_both_directions_against_the_same_queue(reduction, factor):
    both, one = build(symmetric=reduction).eval(), build().eval()
    there = noise(one)
    back = Batch({"query": there.views["key"], "key": there.views["query"]}, there.labels, there.indices)
    forth, reverse, losses = one(there, START), one(back, START), both(there, START)
    assert torch.allclose(losses.total, factor * (forth.total + reverse.total))
    expected = torch.cat([reverse.memory["keys"], forth.memory["keys"]])  # the keys of the first view come first
    assert torch.allclose(losses.memory["keys"], expected)


def test_a_symmetric_view_is_seen_by_both_networks():
    assert MoCo.views(Config(symmetric="mean"), 32)["key"].seen_by == ("student", "teacher")
    views = MoCo.views(Config(), 32)
    assert (views["query"].seen_by, views["key"].seen_by) == (("student",), ("teacher",))


@pytest.mark.parametrize(("alpha", "weight"), [(None, 1 / 4), (0.4, 0.4)])
def test_alpha_weighs_the_global_query_against_the_mean_of_the_locals(alpha, weight):
    model = build(**CROPS, alpha=alpha).eval()
    one = noise(model)
    losses = model(one, START)
    (key,) = losses.memory["keys"]
    embed = lambda view: F.normalize(model.projector(model.backbone(view)), dim=1)  # noqa: E731
    terms = [
        info_nce(embed(view), key, model.queue.rows, temperature=0.2)
        for view in one.views["query"] + one.views["local"]
    ]
    expected = weight * terms[0] + (1 - weight) * torch.stack(terms[1:]).mean()
    assert torch.allclose(losses.total, expected)


def test_a_seventh_and_six_locals_are_the_plain_mean():
    # docs/sources.md#worked-dino
    plain, weighed = (build(num_locals=6, local_size=5, alpha=alpha) for alpha in (None, 1 / 7))
    assert torch.isclose(plain(noise(plain), START).total, weighed(noise(weighed), START).total)


def test_multicrop_costs_two_student_passes_and_one_teacher_pass():
    model = build(**CROPS)
    model(noise(model), START)
    assert model.backbone.seen == [(16, 3, 8, 8), (48, 3, 5, 5)]
    assert model.teacher[0].seen == [(16, 3, 8, 8)]


def test_sslights_views_have_the_papers_sizes_and_areas():
    sizes = {}
    for preset, smallest in [("sslight_baseline", 0.14), ("sslight", 0.3)]:
        views = MoCo.views(resolved("moco", preset=preset).method, 224)
        assert (views["query"].area, views["local"].area) == ((smallest, 1.0), (0.05, smallest))
        assert (views["key"].augmentation.blur, views["query"].augmentation.solarize) == (1.0, 0.2)
        sizes[preset] = (views["query"].size, views["local"].size, views["local"].count)
    assert sizes == {"sslight_baseline": (224, 96, 6), "sslight": (224, 128, 6)}


def test_local_views_as_large_as_the_image_are_refused():
    with pytest.raises(ValueError, match=r"local views of 32 pixels are no smaller than the images \(32\)"):
        MoCo.views(resolved("moco", preset="sslight").method, 32)


def test_alpha_without_local_views_is_refused():
    with pytest.raises(ValueError, match="method: alpha weighs pairs of global views against local ones"):
        parse(Config, {"alpha": 0.4}, "method")


def test_split_statistics_make_the_shuffle_matter():
    # With statistics of the whole batch a permutation changes nothing (docs/sources.md#worked-moco).
    keys = {}
    for splits in (1, 4):
        for seed in (0, 1):
            model = build(batchnorm_splits=splits)
            model.seed = seed
            keys[splits, seed] = model(noise(model), START).memory["keys"][0]
    assert torch.equal(keys[1, 0], keys[1, 1])
    assert not torch.allclose(keys[4, 0], keys[4, 1])


def test_losses_are_computed_in_float32_under_autocast():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(noise(model), START)
    keys = losses.memory["keys"][0]
    assert torch.equal(losses.total, info_nce(losses.embedding, keys, model.queue.rows, temperature=0.2))


def test_a_queue_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match=r"queue_size 81 is larger than the data set \(80 images\)"):
        build(queue_size=81)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"projector_layers": 1}, [(5, 6)]),
        ({"projector_hidden": "d"}, [(6, 6), (5, 6)]),
        ({"projector_hidden": "2d"}, [(12, 6), (5, 12)]),
        ({"projector_layers": 3, "projector_dropout": 0.5}, [(12, 6), (12, 12), (5, 12)]),
    ],
)
def test_the_projector_has_the_configured_layers(changes, shapes):
    weights = [p for p in build(**changes).projector.parameters() if p.dim() == 2]
    assert [tuple(weight.shape) for weight in weights] == shapes


def test_truncated_normal_weights_are_sslights():
    model = build(projector_hidden=256, projector_weights="truncated_normal")
    assert abs(model.projector[2].weight.std().item() - 0.02) < 0.002
    assert model.projector[0].bias.abs().sum() == 0


class TestInitial:
    def start(self, path, **changes) -> Any:
        torch.manual_seed(1)
        network = build_backbone(Backbone(name="mobilenet_v3_small", stem="small"), 16)
        config = Config(**{**SMALL, "initial": path, **changes})
        return MoCo(config, network, num_images=80, batch_size=16, seed=0)

    @pytest.fixture
    def network(self):
        torch.manual_seed(2)
        return build_backbone(Backbone(name="mobilenet_v3_small", stem="small"), 16)

    def test_a_backbone_file_gives_student_and_teacher_its_weights(self, network, tmp_path):
        save_backbone(tmp_path / "b", network, Backbone(name="mobilenet_v3_small", stem="small"), 16, {})
        model = self.start(tmp_path / "b")
        expected = network.state_dict()
        for found in (model.backbone, model.teacher[0]):
            assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())

    @pytest.mark.parametrize("fits", [True, False])
    def test_a_method_file_gives_its_projector_only_if_it_fits(self, fits, network, tmp_path, capsys):
        donor: Any = MoCo(Config(**SMALL), network, num_images=80, batch_size=16, seed=0)
        save_file({name: value.clone() for name, value in donor.state_dict().items()}, tmp_path / "m")
        model = self.start(tmp_path / "m", **({} if fits else {"projector_hidden": "2d"}))
        assert torch.equal(model.backbone.features[0][0].weight, donor.backbone.features[0][0].weight)
        assert (model.projector[0].weight.shape == donor.projector[0].weight.shape) == fits
        if fits:
            assert torch.equal(model.projector[0].weight, donor.projector[0].weight)
        assert ("the projector's initial weights are random" in capsys.readouterr().err) != fits

    def test_another_backbone_is_refused(self, tmp_path):
        save_file({f"backbone.{name}": value.clone() for name, value in Tiny().state_dict().items()}, tmp_path / "t")
        with pytest.raises(ValueError, match="does not fit MobileNetV3"):
            self.start(tmp_path / "t")


@pytest.mark.parametrize(
    ("method", "training"),
    [
        ({"symmetric": "sum", "final_teacher_momentum": 1.0}, {"optimizer": "adamw", "learning_rate": 1e-3}),
        ({"projector_dropout": 0.5}, {"precision": "bf16"}),
    ],
    ids=["symmetric, adamw", "dropout, bf16"],
)
def test_switches_that_no_preset_uses_resume_exactly(method, training):
    resume_is_exact(MoCo, Config(**{**SMALL, **method}), **training)


def test_symmetric_keys_of_two_processes_equal_those_of_one(tmp_path):
    variants = [{"symmetric": "sum"}, {"symmetric": "mean", "batchnorm_splits": 2}]
    configs = [Config(**{**SMALL, **variant}) for variant in variants]
    two_processes_equal_one(MoCo, *configs, folder=tmp_path)
