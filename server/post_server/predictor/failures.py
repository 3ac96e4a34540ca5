"""How a failure in the predictor is reported to the caller and in the log."""

from __future__ import annotations

import logging

from post_shared.errors import InvalidInput, PostError

log = logging.getLogger("post.predictor")

NOT_FINITE = InvalidInput(
    "the model's outputs are NaN or infinite; the prompt's values may be far too large: tune it again"
)


def as_post_error(error: Exception) -> PostError:
    """The error itself if it was raised on purpose; otherwise one that refers to the log."""
    if isinstance(error, PostError):
        return error
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    location = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
    # Neither the message nor the frames' values: either could contain a text.
    log.error("prediction failed: %s at %s", type(error).__name__, location)
    return PostError("the prediction failed unexpectedly; see the predictor's log")
