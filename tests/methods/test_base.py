"""What holds for every method alike."""

from pathlib import Path

import pytest

from ssl_core.methods import base

NAMES = sorted({path.stem for path in Path(base.__file__).parent.glob("[a-z]*.py")} - {"base"})
NEEDED = {"seed": {"teacher": {"weights": "teacher.safetensors"}}}


@pytest.mark.parametrize("name", NAMES)
def test_a_count_that_the_loss_cannot_take_is_refused_before_anything_runs(name: str) -> None:
    spec = {
        "dataset": {"name": "demo"},
        "backbone": {"name": "resnet18"},
        "method": {"name": name, **NEEDED.get(name, {})},
    }
    own = base.views_of(base.resolve(spec), 32)
    fixed = base.method_class(name).fixed_views
    assert set(fixed) <= set(own)
    for group, view in own.items():
        for count in {1, view.count + 1} - {view.count}:
            changed = base.resolve({**spec, "views": {group: {"count": count}}})
            if group in fixed:
                said = f"views.{group}.count: {name} takes {view.count} .* found {count}"
                with pytest.raises(ValueError, match=said):
                    base.views_of(changed, 32)
            else:
                assert base.views_of(changed, 32)[group].count == count
