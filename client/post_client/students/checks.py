"""What a student must keep to, so that a private run is private: the provider who ships it isn't trusted.

Clipping bounds what one row does to the sum of gradients only if a row's gradient depends on that row alone. Rows share
forward passes, and the longest decides how far the others are padded; a configuration can make a model see that.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.errors import InvalidInput, ModelUnsafe
from post_shared.model.language_model import LanguageModel

SHORT = 4
"""Tokens of the row whose answer is watched."""
REMEMBERS = {"dynamic"}
"""Kinds of rope scaling that keep something of earlier texts."""
TOLERANCE = 1e-3
"""Largest share of the logits' spread that rounding may move; what a configuration does is far above it."""


def load_student(folder: str | Path, device: str, *, private: bool = True) -> LanguageModel:
    """A student to tune on: for a private run in float32 also on a GPU, as :func:`check_rows_are_apart` wants it, else
    in what trains fastest there (:func:`post_shared.model.devices.training_dtype`).

    Raises:
        InvalidInput: the folder holds no language model, or there is no such device.
    """
    return LanguageModel.load(folder, device=device, dtype=torch.float32 if private else None, teaches=True)


def check_vocabulary(student: LanguageModel) -> None:
    """Raise :class:`ModelUnsafe` on a tokenizer with tokens that the student can't embed.

    The first row with such a token would end a private run: that row would show in whether a prompt comes out.
    """
    largest = max(student.tokenizer.get_vocab().values())
    if largest >= student.vocabulary:
        raise ModelUnsafe(
            f"the student's tokenizer has a token {largest}, but the student embeds only {student.vocabulary} tokens; "
            "ask the provider for a sound student"
        )


@torch.no_grad()
def check_rows_are_apart(student: LanguageModel, prompt: Tensor, max_length: int) -> None:
    """Run a short row beside ones of every length up to ``max_length``: its answer must stay what it is alone.

    No private row is used. Going through the lengths upwards and then back to the row alone also shows a model that
    remembers the longest batch it has seen.

    Raises:
        InvalidInput: the student computes in 16 bits, whose rounding alone would change the answer.
        ModelUnsafe: the answer changes, by padding, by attention to it, or by positions that depend on the length.
    """
    if student.dtype.itemsize < 4:
        raise InvalidInput(
            f"a private run needs a student in float32, not {str(student.dtype).removeprefix('torch.')}: in 16 bits "
            "the texts beside a row change its answer; load it with dtype=torch.float32"
        )
    _check_rows_leave_no_trace(student.config.to_dict())
    rows = [_row(student, SHORT), *(_row(student, length) for length in range(SHORT, max_length + 1))]
    encoded = EncodedRows(tuple(rows))
    shared = student.share_prefix(prompt) if student.can_share_prefix(len(prompt), max_length) else None

    def answer(*index: int) -> Tensor:  # as a private step asks the student
        batch = encoded.batch(index)
        own = prompt.to(student.device).expand(len(index), -1, -1)
        return student.answer_logits(batch, own if shared is None else shared.rows(len(index)))[0].double()

    alone = answer(0)
    allowed = TOLERANCE * float(alone.std())
    for other in (*range(1, len(rows)), 0):
        changed = answer(0, other) if other else answer(0)
        if not float((changed - alone).abs().max()) <= allowed:  # also true for numbers that aren't finite
            raise ModelUnsafe(
                "the student's answer to a text depends on the texts beside it (on how far it is padded), so one row "
                "would change the gradients of others and differential privacy would not hold; ask the provider for a "
                "sound student"
            )


def _check_rows_leave_no_trace(config: object) -> None:
    """Raise :class:`ModelUnsafe` on positions that stretch to the longest row seen so far."""
    if isinstance(config, dict):
        if REMEMBERS & {str(config.get(name)) for name in ("rope_type", "type")}:
            raise ModelUnsafe(
                "the student's positions follow the longest text that it has seen (dynamic rope scaling), so one row "
                "would change the gradients of others and differential privacy would not hold; ask the provider for "
                "another student"
            )
        for each in config.values():
            _check_rows_leave_no_trace(each)
    elif isinstance(config, list | tuple):
        for each in config:
            _check_rows_leave_no_trace(each)


def _row(student: LanguageModel, length: int) -> EncodedRow:
    """Some tokens; a masked model answers at a mask in the last place."""
    ids = [7 + at % 5 for at in range(length)]
    if student.kind == "masked":
        ids[-1] = int(student.tokenizer.mask_token_id)
    return EncodedRow(ids, [length - 1], [], None)
