"""What an exception in a job means: a fault that passes, one that has a name, or one that nobody expected."""

from __future__ import annotations

import errno

from post_server.storage.outages import causes
from post_shared.errors import DiskFull, OutOfMemory, PostError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


def known_failure(error: Exception) -> PostError | None:
    """The error that a job's row shows for it; None for one that nobody expected."""
    if isinstance(error, PostError):
        return error
    if _is_out_of_memory(error):
        return OutOfMemory("memory ran out; use a smaller model, batch or sequence length")
    if any(_is_no_room(each) for each in causes(error)):
        return DiskFull("the worker's disk is full; make room under its POST_HOME and its store, then order again")
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it by a class on a GPU and by a text on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _is_no_room(error: BaseException) -> bool:
    """Libraries that write by themselves (safetensors) say it only in words."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return any(text in str(error) for text in _NO_ROOM_TEXTS)
