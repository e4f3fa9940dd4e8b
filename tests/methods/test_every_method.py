"""The contract of a method, tested for every file in `ssl_core/methods/` with all its presets.

A new method needs no entry here. Sizes are reduced by a rule: integers above 64 become 24. A required setting with a
file of weights (SEED's teacher) gets a small pre-trained network. A method whose teacher is optional is tested with its
first preset and such a network as well.
"""

import copy
import functools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ssl_core.blocks.schedules import cosine
from ssl_core.config import Backbone, Experiment, Strict
from ssl_core.methods import base, dino
from ssl_core.methods.base import Method, MethodConfig, Progress
from ssl_core.networks.backbones import build_backbone, save_backbone, write_tensors
from ssl_core.networks.heads import mlp
from tests.methods import harness
from tests.methods.harness import START, batch, make, select, smallest_views

NAMES = base.method_names()
SMALL = 24
WITH_TEACHER = "+teacher"  # behind a preset
PARTS_OF_A_RUN = [Progress(0, 100), Progress(50, 100), Progress(99, 100)]


def with_setting(key: str) -> list[str]:
    return [name for name in NAMES if key in base.method_class(name).Config.model_fields]


def presets_of(name: str) -> list[str]:
    """Return the presets, and the first one with a frozen teacher if the method has it as an option."""
    presets = list(base.load_method_module(name).PRESETS)
    teacher = base.method_class(name).Config.model_fields.get("teacher")
    optional = teacher is not None and not teacher.is_required()
    return [*presets, f"{presets[0]}{WITH_TEACHER}"] if optional else presets


CASES = [(name, preset) for name in NAMES for preset in presets_of(name)]
each_method = pytest.mark.parametrize("name", NAMES)
each_preset = pytest.mark.parametrize(("name", "preset"), CASES)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained backbone, for methods that require one; beside it the files of heads for those with an option."""
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    network = Backbone(name="mobilenet_v3_small", stem="small")
    torch.manual_seed(1)
    backbone = build_backbone(network, 16)
    save_backbone(path, backbone, network, 16, {})
    projector = {f"projector.{name}": tensor for name, tensor in mlp([backbone.num_features, 5]).state_dict().items()}
    head = dino.Head(backbone.num_features, dino.Config(num_outputs=SMALL, head_hidden=SMALL, bottleneck_dim=SMALL))
    write_tensors(path.with_name("ressl.safetensors"), projector, {})
    write_tensors(path.with_name("swav.safetensors"), {**projector, "prototypes": torch.randn(SMALL, 5)}, {})
    outputs = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    write_tensors(path.with_name("dino.safetensors"), outputs, {})
    return path


def required_settings(config: type[MethodConfig], weights: Path) -> dict[str, Any]:
    """Return values for the settings without a default: sections with a `weights` key get the file."""
    settings = {}
    for name, field in config.model_fields.items():
        if field.is_required():
            section = field.annotation
            assert isinstance(section, type), name
            assert issubclass(section, Strict), name
            assert "weights" in section.model_fields, name
            settings[name] = {"weights": str(weights)}
    return settings


def resolve(name: str, weights: Path, preset: str | None = None, **changes: Any) -> Experiment:
    """Resolve an experiment with this method, at its published sizes."""
    settings = {**required_settings(base.method_class(name).Config, weights), **changes}
    if preset is not None:
        settings["preset"] = preset.removesuffix(WITH_TEACHER)
        if preset.endswith(WITH_TEACHER):
            head = weights.with_name(f"{name}.safetensors")
            settings["teacher"] = {"weights": str(weights), "projector": str(head)}
            settings.pop("embedding_dim", None)  # that of the teacher
    return harness.resolved(name, **settings)


def small(name: str, weights: Path, preset: str | None = None, **changes: Any) -> Experiment:
    """Resolve an experiment with this method, with small heads, queues and banks."""
    published = resolve(name, weights, preset).method
    sizes = {key: SMALL for key, value in published if isinstance(value, int) and value > 64}
    return resolve(name, weights, preset, **{**sizes, **changes})


def build(name: str, weights: Path, preset: str | None = None, **changes: Any) -> tuple[Method, MethodConfig]:
    config = small(name, weights, preset, **changes).method
    return make(base.method_class(name), config), config


def draw(name: str, config: MethodConfig, seed: int = 0) -> Any:
    return batch(smallest_views(base.method_class(name), config), seed=seed)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in after.items() if not torch.equal(value, before[name])]


def attributes(model: nn.Module) -> dict[str, str]:
    """Return all attributes of all modules that are neither parameters, buffers nor modules, as text."""
    texts = {}
    for path, module in model.named_modules():
        if not isinstance(module, harness.Tiny):  # records shapes
            public = {key: value for key, value in vars(module).items() if not key.startswith("_")}
            texts |= {f"{path}.{key}": repr(value) for key, value in public.items()}
    return texts


# Settings and views


@each_method
def test_the_presets_are_the_values_of_the_key(name: str) -> None:
    field = base.method_class(name).Config.model_fields["preset"]
    assert list(get_args(field.annotation)) == list(base.load_method_module(name).PRESETS)


@each_preset
def test_views_are_valid(name: str, preset: str, weights: Path) -> None:
    experiment = resolve(name, weights, preset)
    assert experiment.method.preset == preset.removesuffix(WITH_TEACHER)  # pyright: ignore[reportAttributeAccessIssue]
    views = base.views_of(experiment, 224)
    assert any("student" in view.seen_by for view in views.values())
    assert all(view.count >= 1 and 0 < view.size <= 224 for view in views.values())
    assert set(base.method_class(name).fixed_views) <= set(views)


@each_method
def test_a_count_of_views_that_the_loss_does_not_accept_is_refused(name: str, weights: Path) -> None:
    experiment = small(name, weights)
    fixed = base.method_class(name).fixed_views
    for group, view in base.views_of(experiment, 32).items():
        for count in {1, view.count + 1} - {view.count}:
            other = experiment.model_copy(update={"views": {group: {"count": count}}})
            if group in fixed:
                with pytest.raises(
                    ValueError, match=f"views.{group}.count: {name} takes {view.count} .* found {count}"
                ):
                    base.views_of(other, 32)
            else:
                assert base.views_of(other, 32)[group].count == count


# forward


@each_preset
def test_forward_changes_only_batchnorm_statistics(name: str, preset: str, weights: Path) -> None:
    model, config = build(name, weights, preset)
    state, before = copied(model.train().state_dict()), attributes(model)
    model(draw(name, config), START)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert [key for key in changed(state, model.state_dict()) if not key.endswith(statistics)] == []
    assert attributes(model) == before


@each_preset
def test_evaluation_mode_changes_nothing_and_is_repeatable(name: str, preset: str, weights: Path) -> None:
    model, config = build(name, weights, preset)
    state, one = copied(model.eval().state_dict()), draw(name, config)
    first, second = model(one, START), model(one, START)
    assert changed(state, model.state_dict()) == []
    assert torch.equal(first.total, second.total)
    assert (first.memory or {}).keys() == (second.memory or {}).keys()
    for key, value in (first.memory or {}).items():
        assert torch.equal(value, second.memory[key])


@each_preset
def test_only_the_total_has_a_gradient(name: str, preset: str, weights: Path) -> None:
    model, config = build(name, weights, preset)
    losses = model(draw(name, config), START)
    assert losses.total.shape == ()
    assert losses.total.requires_grad
    assert not losses.embedding.requires_grad
    assert losses.embedding.dim() == 2
    others = {**losses.parts, **(losses.memory or {})}
    assert [key for key, value in others.items() if value.requires_grad] == []


@each_preset
def test_the_gradient_reaches_the_student_but_no_teacher_and_no_buffer(name: str, preset: str, weights: Path) -> None:
    model, config = build(name, weights, preset)
    frozen = [part for part in model.children() if not any(p.requires_grad for p in part.parameters())]
    for part in frozen:
        part.requires_grad_(True)  # now only `no_grad` or `detach` in the forward pass keeps a gradient away
    losses = model.train()(draw(name, config), START)
    losses.total.backward()
    teachers = {id(parameter) for part in frozen for parameter in part.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained if p.grad is None} == teachers
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    harness.remember(model, losses)
    assert [key for key, value in model.named_buffers() if value.requires_grad] == []


@each_method
def test_the_order_of_the_images_does_not_matter(name: str, weights: Path) -> None:
    if base.method_class(name).order_matters:
        pytest.skip("declared by `order_matters`")
    model, config = build(name, weights)
    one = draw(name, config)
    order = torch.randperm(harness.BATCH, generator=torch.Generator().manual_seed(3)).tolist()
    first, second = (model.eval()(each, START).total for each in (one, select(one, order)))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@each_method
def test_every_number_of_the_loss_reaches_it(name: str, weights: Path) -> None:
    """In at least one preset and at one time of the run, since some belong to a warm-up or to a switch."""
    keys = base.method_class(name).Config.model_fields
    unused = {key for key in keys if key.endswith(("temperature", "_weight", "epsilon", "iterations"))}
    for preset in base.load_method_module(name).PRESETS:
        config = small(name, weights, preset).method
        totals = totals_after_a_step(name, weights, preset)
        for key in sorted(unused):
            value = getattr(config, key)
            if value is not None:
                other = value + 1 if isinstance(value, int) else 1.2 * value or 1.0
                others = totals_after_a_step(name, weights, preset, **{key: other})
                if not torch.equal(totals, others):
                    unused.remove(key)
    assert unused == set()


def totals_after_a_step(name: str, weights: Path, preset: str, **changes: Any) -> Tensor:
    """Return the loss at three times of a run, with queues and banks that have embeddings of one batch."""
    with harness.float64():
        model, config = build(name, weights, preset, **changes)
        harness.remember(model, model.eval()(draw(name, config, seed=1), START))
        one = draw(name, config)
        return torch.stack([model(one, progress).total.detach() for progress in PARTS_OF_A_RUN])


@each_preset
def test_constant_features_give_a_finite_loss_and_raise_the_alarm(name: str, preset: str, weights: Path) -> None:
    harness.collapse_alarms(base.method_class(name), small(name, weights, preset).method)


@each_preset
def test_losses_are_computed_in_float32_under_autocast(name: str, preset: str, weights: Path) -> None:
    model, config = build(name, weights, preset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(draw(name, config), START)
    floats = [losses.total, losses.embedding, *losses.parts.values(), *(losses.memory or {}).values()]
    assert {value.dtype for value in floats if value.is_floating_point()} == {torch.float32}


# after_step


FINAL = "final_teacher_momentum"


@pytest.mark.parametrize("end", [None, 1.0], ids=["constant", "cosine"])
@pytest.mark.parametrize("name", with_setting("teacher_momentum"))
def test_the_teacher_follows_the_student_once_per_step(name: str, end: float | None, weights: Path) -> None:
    fixed = name not in with_setting(FINAL)  # the momentum always rises to 1
    model: Any
    changes: dict[str, Any] = {} if fixed else {FINAL: end}
    model, config = build(name, weights, teacher_momentum=0.5, **changes)
    teacher, student = model.teacher[0].layer.weight, model.backbone.layer.weight
    assert torch.equal(teacher, student)
    expected = teacher.clone()
    for step in range(5):
        progress = Progress(step, 10)
        parts = [model(draw(name, config, seed=part), progress) for part in (0, 1)]
        with torch.no_grad():
            student.add_(1)  # as an optimizer might
        momentum = cosine(0.5, 1.0, step / 10) if end or fixed else 0.5
        expected.lerp_(student.detach(), 1 - momentum)
        harness.remember(model, *parts, progress=progress)
        torch.testing.assert_close(teacher, expected)


@pytest.mark.parametrize("name", sorted({*with_setting("queue_size")} - {"swav"}))  # which has a queue per view
def test_all_keys_of_a_step_enter_the_queue_after_it(name: str, weights: Path) -> None:
    model: Any
    model, config = build(name, weights)
    expected = copy.deepcopy(model.queue)
    parts = [model(draw(name, config, seed=part), START) for part in (0, 1)]
    for part in parts:
        expected.enqueue(part.memory["keys"].flatten(0, -2))
    harness.remember(model, *parts)
    assert torch.equal(model.queue.rows, expected.rows)
    assert torch.equal(model.queue.position, expected.position)
    assert torch.allclose(model.queue.rows.norm(dim=1), torch.ones(SMALL))


# Training


def training_of(experiment: Experiment) -> dict[str, Any]:
    """Return the preset's training settings, adapted to the ten steps of the harness."""
    few = {"epochs": harness.EPOCHS, "batch_size": harness.BATCH, "precision": "fp32", "milestones": (1,)}
    settings = {**experiment.training.model_dump(), **few}
    return {**settings, "warmup_epochs": min(0.5, experiment.training.warmup_epochs)}


@each_preset
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, preset: str, weights: Path) -> None:
    experiment = small(name, weights, preset)
    training = {**training_of(experiment), "accumulation": 2}
    harness.resume_is_exact(base.method_class(name), experiment.method, **training)


@each_method
def test_a_resumed_run_in_bfloat16_equals_an_uninterrupted_one(name: str, weights: Path) -> None:
    experiment = small(name, weights)
    training = {**training_of(experiment), "precision": "bf16"}
    harness.resume_is_exact(base.method_class(name), experiment.method, **training)


@each_method
def test_two_processes_equal_one(name: str, weights: Path, tmp_path: Path) -> None:
    resolved = functools.partial(small, name, weights)
    configs = [resolved(preset).method for preset in presets_of(name)]
    harness.two_processes_equal_one(base.method_class(name), *configs, folder=tmp_path)
