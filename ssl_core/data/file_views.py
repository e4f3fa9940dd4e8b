"""Views of image files that are in no shard, by the decoder and the operators of the loader."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_core.data.pipeline import FILES, Plan, file_graph
from ssl_core.data.views import View


class FileViews:
    """Turns the content of image files into one view of each, on `device`.

    The files must be readable by DALI, as `image_files.prepare` returns them: its decoder may crash on damaged ones.
    """

    def __init__(
        self,
        view: View,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        gpu = device == "cuda"
        plan = Plan(
            tars=(),
            indices=(),
            views={"file": view},
            mean=tuple(mean),
            std=tuple(std),
            seed=0,
            shuffle_buffer=0,
            gpu=gpu,
        )
        self._pipeline = file_graph(
            plan,
            batch_size=batch_size,
            num_threads=threads,
            device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=1,  # each run gets its own files
        )
        self._pipeline.build()

    def __call__(self, files: Sequence[bytes]) -> Tensor:
        """Return (files, 3, size, size), channels last; at most `batch_size` files."""
        (images,) = self._pipeline.run(**{FILES: [np.frombuffer(content, np.uint8) for content in files]})
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
