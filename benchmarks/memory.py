"""Peak memory of a process, for benchmarks that measure each case in its own process."""

from pathlib import Path


def peak_bytes() -> int:
    """Return the peak resident bytes; `ru_maxrss` would include the peak of the parent process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
