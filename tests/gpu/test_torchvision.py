"""The comparisons of tests/data/test_pipeline.py with torchvision and PIL, on the GPU's graph."""

import pytest

from tests.data import test_pipeline

pytestmark = pytest.mark.slow
images = test_pipeline.images
globals().update({name: value for name, value in vars(test_pipeline).items() if name.startswith("test_")})
