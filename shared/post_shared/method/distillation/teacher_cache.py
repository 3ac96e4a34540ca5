"""The target's last hidden states, kept in a file: a corpus that is passed again needs no second pass of the target."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from post_shared.model.language_model import LanguageModel
from post_shared.training.checkpoint import fingerprint

log = logging.getLogger("post.distillation")

CACHE_BYTES = 2 * 2**30
"""Room on the disk, unless more or less is given."""
_SUM = struct.Struct("<Q")
_WRITTEN = 1 << 32
"""Set in every checksum that was written, so that a hole in the file is none."""


@dataclass(frozen=True)
class CacheBudget:
    """How much may be kept, and in which type: float16 is off by at most 2^-11 of each value."""

    max_bytes: int
    dtype: torch.dtype = torch.float16
    """A target in 16 bits keeps its own type, and so its exact states."""


class TeacherCache:
    """States (T, d) of whole blocks of one corpus; a corpus that is larger than the room is kept in part.

    Block i has place i. A state is followed by its checksum: what a killed process, or a full disk, left half
    written is never read. States come rounded to the file's type, whether they were just made or read back.
    """

    def __init__(
        self, folder: Path, corpus: str, shape: tuple[int, int], target: LanguageModel, cache_budget: CacheBudget
    ) -> None:
        """``corpus`` is the digest of the corpus, ``shape`` its blocks' (N, T)."""
        self.target = target
        self._dtype = target.dtype if target.dtype.itemsize <= 2 else cache_budget.dtype
        blocks, length = shape
        self._shape = (length, target.hidden_size)
        self._record = length * target.hidden_size * self._dtype.itemsize + _SUM.size
        self.blocks = min(blocks, cache_budget.max_bytes // self._record)
        work = fingerprint(corpus, str(self._dtype), target)
        self.path = folder / f"teacher-{work[:16]}.states"
        self._writes = self.blocks > 0
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.blocks * self._record)  # a hole: the disk is used as states come
            self._file = os.open(self.path, os.O_RDWR)
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.blocks, self._record))

    @torch.no_grad()
    def hidden(self, blocks: Sequence[int], token_ids: Tensor) -> Tensor:
        """The target's last hidden states (B, T, d) on the blocks of those numbers; it runs on unknown ones only."""
        known = [self._read(at) for at in blocks]
        missing = [row for row, states in enumerate(known) if states is None]
        if missing:
            made = self.target.hidden(token_ids[missing])
            for row, states in zip(missing, made, strict=True):
                known[row] = self._keep(blocks[row], states)
        return torch.stack([states for states in known if states is not None])

    def remove(self) -> None:
        """Free the disk."""
        if self.blocks:
            os.close(self._file)
            del self._bytes
            self.blocks, self._writes = 0, False
            self.path.unlink(missing_ok=True)

    def _read(self, at: int) -> Tensor | None:
        if at >= self.blocks:
            return None
        record = self._bytes[at].tobytes()
        data, written = record[: -_SUM.size], _SUM.unpack(record[-_SUM.size :])[0]
        if written != _checksum(at, data):
            return None
        states = torch.frombuffer(bytearray(data), dtype=self._dtype).reshape(self._shape)
        return states.to(self.target.device, self.target.dtype)

    def _keep(self, at: int, states: Tensor) -> Tensor:
        """The states as later passes will read them; larger ones than the type holds aren't kept."""
        rounded = states.to(self._dtype)
        if at >= self.blocks or not bool(rounded.isfinite().all()):
            return states
        data = rounded.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        if self._writes:
            try:
                os.pwrite(self._file, data + _SUM.pack(_checksum(at, data)), at * self._record)
            except OSError as error:
                self._writes = False
                log.warning("the target's states are kept no further: %s", error)
        return rounded.to(states.dtype)


def _checksum(at: int, data: bytes) -> int:
    return _WRITTEN | zlib.crc32(data, at)
