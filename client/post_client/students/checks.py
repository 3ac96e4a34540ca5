"""What a student must keep to, so that a private run is private: the provider who ships it isn't trusted.

Clipping bounds what one row adds to the sum of gradients only if a row's gradient depends on that row alone. Each row
runs by itself (:mod:`post_client.privacy.dp_optimizer`), so what is left to check is memory: a student must compute
the same whatever rows it has seen before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.errors import InvalidInput, ModelUnsafe
from post_shared.model.language_model import LanguageModel

SHORT = 4
"""Tokens of the row whose answer is compared."""
STATEFUL_ROPE = {"dynamic"}
"""Kinds of rope scaling that keep something of earlier texts."""


def load_student(folder: str | Path, device: str, *, private: bool = True) -> LanguageModel:
    """A student to tune on: for a private run in float32 also on a GPU, as :func:`check_keeps_no_state` wants it, else
    in what trains fastest there (:func:`post_shared.engine.precision.choose_precision`).

    Raises:
        InvalidInput: the folder holds no language model, or there is no such device.
    """
    return LanguageModel.load(folder, device=device, dtype=torch.float32 if private else None, for_training=True)


def check_tokenizer(student: LanguageModel) -> None:
    """Raise :class:`ModelUnsafe` on a tokenizer with tokens that the student can't embed, or one that draws lots.

    The first row with such a token would end a private run: that row would show in whether a prompt comes out. And a
    run that is started again draws the same noise, so its rows must have the same tokens as well.
    """
    largest = max(student.tokenizer.get_vocab().values())
    if largest >= student.vocabulary:
        raise ModelUnsafe(
            f"the student's tokenizer has a token {largest}, but the student embeds only {student.vocabulary} tokens; "
            "ask the provider for a sound student"
        )
    core = getattr(student.tokenizer, "backend_tokenizer", None)
    dropout = json.loads(core.to_str())["model"].get("dropout") if core is not None else None
    if dropout:
        raise ModelUnsafe(
            f"the student's tokenizer leaves out merges at random (dropout {dropout}): the same row would have other "
            "tokens each time, under the same noise; ask the provider for a student without dropout"
        )


@torch.no_grad()
def check_keeps_no_state(student: LanguageModel, prompt: Tensor, max_length: int) -> None:
    """Run a short row, rows of every length up to ``max_length``, and the short one again: not a bit may differ.

    No private row is used. The buffers must stay what they were, too.

    Raises:
        InvalidInput: the student computes in 16 bits: its gradients overflow and lose most of their digits.
        ModelUnsafe: the answer or a buffer changes.
    """
    if student.dtype.itemsize < 4:
        raise InvalidInput(
            f"a private run needs a student in float32, not {str(student.dtype).removeprefix('torch.')}: load it with "
            "dtype=torch.float32"
        )
    _check_rope(student.config.to_dict())
    encoded = EncodedRows(tuple(_row(student, length) for length in range(SHORT, max(SHORT, max_length) + 1)))
    own = prompt.to(student.device)[None]  # (1, l, d)
    before = digest_of(student.model.named_buffers())
    answer = student.answer_logits(encoded.batch([0]), own)
    for longer in range(1, len(encoded)):
        student.answer_logits(encoded.batch([longer]), own)
    again = student.answer_logits(encoded.batch([0]), own)
    if not torch.equal(again.nan_to_num(), answer.nan_to_num()) or digest_of(student.model.named_buffers()) != before:
        raise ModelUnsafe(
            "the student's answer to a text depends on texts that it has seen before, so one row would change the "
            "gradients of others and differential privacy would not hold; ask the provider for a sound student"
        )


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and bits of named tensors: parameters, or buffers with those that aren't saved."""
    digest = sha256()
    for name, tensor in tensors:
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_rope(config: object) -> None:
    """Raise :class:`ModelUnsafe` on positions that stretch to the longest row seen so far."""
    if isinstance(config, dict):
        if STATEFUL_ROPE & {str(config.get(name)) for name in ("rope_type", "type")}:
            raise ModelUnsafe(
                "the student's positions follow the longest text that it has seen (dynamic rope scaling), so one row "
                "would change the gradients of others and differential privacy would not hold; ask the provider for "
                "another student"
            )
        for each in config.values():
            _check_rope(each)
    elif isinstance(config, list | tuple):
        for each in config:
            _check_rope(each)


def _row(student: LanguageModel, length: int) -> EncodedRow:
    """Some tokens; a masked model answers at a mask in the last place."""
    ids = [7 + at % 5 for at in range(length)]
    if student.kind == "masked":
        ids[-1] = int(student.tokenizer.mask_token_id)
    return EncodedRow(ids, [length - 1], [], None)
