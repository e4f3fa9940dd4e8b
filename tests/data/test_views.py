"""Views: policies have the papers' numbers, changes affect only the keys they name, mistakes get a hint."""

from typing import Any

import pytest
from pydantic import ValidationError

from ssl_core.data.views import POLICIES, Augmentation, View, Views, adjust


@pytest.fixture
def views() -> Views:
    return {
        "student": View(count=2, size=32, augmentation=POLICIES["contrastive"]),
        "teacher": View(size=32, augmentation=POLICIES["weak"], seen_by=("teacher",)),
    }


# Flip, jitter, (brightness, contrast, saturation, hue), grayscale, blur, solarize (docs/sources.md#augmentations).
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("none", (0, 0, (0, 0, 0, 0), 0, 0, 0)),
        ("weak", (0.5, 0, (0, 0, 0, 0), 0, 0, 0)),
        ("contrastive", (0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0)),
        ("contrastive_no_blur", (0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0, 0)),
        ("simclr", (0.5, 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0)),
        ("simclr_small", (0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0, 0)),
        ("byol_first", (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1, 0)),
        ("byol_second", (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2)),
        ("dino_global_first", (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1, 0)),
        ("dino_global_second", (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2)),
        ("dino_local", (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.5, 0)),
        ("swav", (0.5, 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0)),
        ("aug_plus", (0.5, 0.8, (0.8, 0.8, 0.8, 0.4), 0.5, 0.5, 0)),
        ("npid", (0, 1, (0.4, 0.4, 0.4, 0.4), 0.2, 0, 0)),
        ("strong", (0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0)),
    ],
)
def test_policies_have_the_published_numbers(name: str, numbers: tuple[Any, ...]) -> None:
    a = POLICIES[name]
    colour = (a.brightness, a.contrast, a.saturation, a.hue)
    assert (a.flip, a.jitter, colour, a.grayscale, a.blur, a.solarize) == numbers
    assert a.randaugment == (5 if name == "strong" else 0)
    assert a.blur_sigma == (0.1, 2.0)


def test_an_augmentation_is_a_policy_with_changes() -> None:
    assert View.model_validate({"size": 32, "augmentation": "simclr"}).augmentation == POLICIES["simclr"]
    changed = Augmentation.model_validate({"policy": "simclr", "blur": 0.0})
    assert changed == POLICIES["simclr"].model_copy(update={"blur": 0.0})


def test_a_view_survives_json(views: Views) -> None:
    assert View.model_validate_json(views["student"].model_dump_json()) == views["student"]


def test_changes_affect_only_the_keys_they_name(views: Views) -> None:
    adjusted = adjust(views, {"student": {"size": 16, "augmentation": {"hue": 0.3}}})
    assert adjusted["teacher"] == views["teacher"]
    student = adjusted["student"]
    assert (student.count, student.size, student.area) == (2, 16, (0.2, 1.0))
    assert student.augmentation == POLICIES["contrastive"].model_copy(update={"hue": 0.3})


def test_a_named_policy_replaces_the_augmentation(views: Views) -> None:
    assert adjust(views, {"student": {"augmentation": "weak"}})["student"].augmentation == POLICIES["weak"]


def test_avoided_augmentations_are_off_unless_the_user_sets_them(views: Views) -> None:
    adjusted = adjust(views, {"teacher": {"augmentation": {"flip": 0.25}}}, avoid=["flip", "hue"])
    assert adjusted["student"].augmentation.flip == 0
    assert adjusted["student"].augmentation.hue == 0
    assert adjusted["student"].augmentation.contrast == 0.4
    assert adjusted["teacher"].augmentation.flip == 0.25
    # A policy with flips does not set them explicitly.
    named = adjust(views, {"teacher": {"augmentation": "weak"}}, avoid=["flip"])
    assert named["teacher"].augmentation.flip == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studnt": {}}, r"views\.studnt: .*did you mean 'student'"),
        ({"student": {"sice": 3}}, r"views\.student\.sice: unknown key; did you mean 'size'"),
        ({"student": {"augmentation": {"hew": 0.1}}}, r"augmentation\.hew: unknown key; did you mean 'hue'"),
        (
            {"student": {"augmentation": "contrastiv"}},
            r"no augmentation policy 'contrastiv'; did you mean 'contrastive'",
        ),
    ],
)
def test_a_typo_is_refused_with_the_nearest_name(views: Views, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adjust(views, changes)


def test_an_unknown_augmentation_to_avoid_is_refused(views: Views) -> None:
    with pytest.raises(ValueError, match="no augmentation is called 'flipp'; did you mean 'flip'"):
        adjust(views, {}, avoid=["flipp"])


@pytest.mark.parametrize(
    "section",
    [
        {"size": 0},
        {"size": 32, "count": 0},
        {"size": 32, "area": [0.5, 0.2]},
        {"size": 32, "area": [0.0, 1.0]},
        {"size": 32, "area": [0.2, 1.1]},
        {"size": 32, "region": [0.5, 0.0, 0.5, 1.0]},
        {"size": 32, "region": [0.0, 0.0, 1.0, 1.1]},
        {"size": 32, "crop": "center", "region": [0.0, 0.0, 0.5, 0.5]},
        {"size": 32, "ratio": [2.0, 1.0]},
        {"size": 32, "crop": "middle"},
        {"size": 32, "interpolation": "bicubic"},
        {"size": 32, "resize": 36},  # a random crop has no resize
        {"size": 32, "crop": "center", "resize": 30},
        {"size": 32, "augmentation": {"hue": 0.6}},
        {"size": 32, "augmentation": {"flip": 1.5}},
        {"size": 32, "augmentation": {"contrast": -0.1}},
        {"size": 32, "augmentation": {"blur_sigma": [2.0, 0.1]}},
        {"size": 32, "augmentation": {"blur_sigma": [0.0, 0.1]}},
        {"size": 32, "augmentation": {"randaugment": -1}},
    ],
)
def test_invalid_views_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        View.model_validate(section)
