"""One-line error messages with a remedy, for mistakes of the user and limits of the machine. Torch-free."""

import errno
import os
import re
from collections.abc import Iterator

from pydantic import ValidationError

# Parts of the messages of torch (CPU and CUDA), DALI, CUDA and Python when memory is exhausted.
OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|bad_alloc|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|"
    "CUDNN_STATUS_ALLOC_FAILED|Failed to allocate|can't allocate memory|Can't allocate|CUDA allocation failed"
)
LESS_MEMORY = (
    "out of memory: lower batch_size (training.accumulation keeps the effective batch), use a smaller image_size or "
    "backbone, or end other jobs; `ssl-core explain` estimates the memory that a run needs"
)
MORE_FILES = "too many open files: raise the limit (ulimit -n 65536) and run again"
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
ODD_PATHS = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def explain(error: BaseException) -> str | None:
    """Return one line for an error that the user can fix, None for a bug of this program."""
    for cause in _chain(error):  # before `ValueError`, which an out-of-memory error may have caused
        if isinstance(cause, MemoryError) or is_out_of_memory(cause):
            return LESS_MEMORY
        if isinstance(cause, RuntimeError) and os.strerror(errno.EMFILE) in str(
            cause
        ):  # DALI keeps tens of thousands of shards open
            return MORE_FILES
    if isinstance(error, ValidationError):  # one error is enough
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("ssl_core"):
        return f"the package '{error.name}' is not installed: run `make install`"
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    return _explain_file_error(error) if isinstance(error, OSError) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, CUDA or DALI ran out of memory."""
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _explain_file_error(error: OSError) -> str | None:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return f"{where}no space left on the disk: free some (checkpoints/, shards/, results/) and run again"
    if error.errno in FORBIDDEN:
        return f"{where}{error.strerror}: change the owner or mode of the folder (chown, chmod) or choose another path"
    if error.errno == errno.EMFILE:
        return MORE_FILES
    if error.errno == errno.EEXIST:  # a file is in the place of a folder
        return f"{where}Not a directory: choose another path or move the file that blocks it"
    if error.errno in ODD_PATHS:
        return f"{where}{error.strerror}: choose another path or move the file that blocks it"
    return None


def excerpt(value: object, limit: int = 200) -> str:
    """Return a value for an error message: one line of at most `limit` characters."""
    text = " ".join(str(value).split())
    if len(text) <= limit:
        return text
    return text[: limit - 1] + "…"
