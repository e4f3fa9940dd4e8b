"""The peak of a process's memory, for benchmarks that measure each case in a process of its own."""

from pathlib import Path


def peak_bytes() -> int:
    """Return the most that was resident at once; `ru_maxrss` would begin with what the starting process had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
