"""Keeps progress bars of the model libraries out of the logs."""

from __future__ import annotations


def quiet_models() -> None:
    """Call before loading a model; imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
