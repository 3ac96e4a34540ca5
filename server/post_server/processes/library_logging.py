"""Keeps the model libraries' progress bars out of the logs of processes that load models."""

from __future__ import annotations


def quiet_models() -> None:
    """Call it before a model is loaded; imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
