"""Which exceptions in a job have an error code of their own."""

from __future__ import annotations

import errno

from post_server.storage.outages import causes
from post_shared.errors import DiskFull, OutOfMemory, PostError

_DISK_FULL_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


def known_failure(error: Exception) -> PostError | None:
    """The error that the job's row shows for ``error``; None for an unexpected one."""
    if isinstance(error, PostError):
        return error
    if _is_out_of_memory(error):
        return OutOfMemory("memory ran out; use a smaller model, batch or sequence length")
    if any(_is_disk_full(cause) for cause in causes(error)):
        return DiskFull(
            "the worker's disk is full; free space in its POST_HOME and its store, then start the job again"
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises its own class on a GPU, and only a message tells on a CPU."""
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_class or "can't allocate memory" in str(error)


def _is_disk_full(error: BaseException) -> bool:
    """Libraries that write files themselves (safetensors) only have the message."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL_CODES:
        return True
    return any(text in str(error) for text in _DISK_FULL_TEXTS)
