"""What a caller hears of a failure in the predictor, and what its log may hold of one."""

from __future__ import annotations

import logging

from post_shared.errors import PostError

log = logging.getLogger("post.predictor")


def as_post_error(error: Exception) -> PostError:
    """The error itself if it was raised on purpose; else one that says where to look."""
    if isinstance(error, PostError):
        return error
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
    # Neither the message nor the frames' values: either could hold a text.
    log.error("prediction failed: %s at %s", type(error).__name__, place)
    return PostError("the prediction failed unexpectedly; the predictor's log says more")
