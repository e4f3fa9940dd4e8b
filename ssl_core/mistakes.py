"""What a user got wrong, or the machine ran out of, as one line that says what to do. Torch-free."""

import errno
from collections.abc import Iterator

from pydantic import ValidationError

# What torch (CPU and CUDA), DALI, CUDA and Python say when memory ends.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate",
    "Can't allocate",
    "CUDA allocation failed",
)
LESS_MEMORY = (
    "out of memory: lower batch_size (training.accumulation keeps the effective batch), use a smaller image_size or "
    "backbone, or end other jobs; `ssl-core explain` estimates what a run needs"
)
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
ODD_PATHS = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def explain(error: BaseException) -> str | None:
    """Return one line for an error that the user can mend, None for one of ours."""
    for cause in _chain(error):  # first: a `ValueError` may have been made of an error of memory
        if isinstance(cause, MemoryError) or speaks_of_memory(cause):
            return LESS_MEMORY
    if isinstance(error, ValidationError):  # pydantic's first fault stands for all
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    return _of_files(error) if isinstance(error, OSError) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def speaks_of_memory(error: BaseException) -> bool:
    """Say whether torch, CUDA or DALI found no memory."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _of_files(error: OSError) -> str | None:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return f"{where}no space is left on the disk: free some (checkpoints/, shards/, results/) and run again"
    if error.errno in FORBIDDEN:
        return f"{where}{error.strerror}: make the folder yours (chown, chmod) or choose another place"
    if error.errno == errno.EMFILE:
        return "too many open files: raise the limit (ulimit -n 65536) and run again"
    if error.errno in ODD_PATHS:
        return f"{where}{error.strerror}: choose another path or move what is in the way"
    return None


def excerpt(value: object, limit: int = 200) -> str:
    """Return a value for an error message: one line of at most `limit` characters."""
    text = " ".join(str(value).split())
    if len(text) <= limit:
        return text
    return text[: limit - 1] + "…"
