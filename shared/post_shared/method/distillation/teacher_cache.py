"""A file cache of the target's last hidden states: a second pass over the corpus doesn't run the target again."""

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
"""Default budget on disk."""
_CHECKSUM = struct.Struct("<Q")
_WRITTEN = 1 << 32
"""Set in every written checksum, so that a hole in the file is never a valid one."""


@dataclass(frozen=True)
class CacheBudget:
    """How many bytes may be stored, and in which type: float16 has a relative error of at most 2^-11."""

    max_bytes: int
    dtype: torch.dtype = torch.float16
    """The states of a 16-bit target are stored in its own type, exactly."""


class TeacherCache:
    """Hidden states (T, d) of whole blocks of one corpus; only the first blocks if the corpus exceeds the budget.

    Block i is record i, followed by its checksum: a record that a killed process or a full disk left half written is
    never read. States are rounded to the file's type, whether they were just computed or read back.
    """

    def __init__(
        self, folder: Path, corpus: str, shape: tuple[int, int], target: LanguageModel, cache_budget: CacheBudget
    ) -> None:
        """``corpus`` is the digest of the corpus, ``shape`` its blocks' (N, T)."""
        self.target = target
        self._dtype = target.dtype if target.dtype.itemsize <= 2 else cache_budget.dtype
        blocks, length = shape
        self._shape = (length, target.hidden_size)
        self._record_bytes = length * target.hidden_size * self._dtype.itemsize + _CHECKSUM.size
        self.capacity = min(blocks, cache_budget.max_bytes // self._record_bytes)
        """Blocks that are cached."""
        run_id = fingerprint(corpus, str(self._dtype), target)
        self.path = folder / f"teacher-{run_id[:16]}.states"
        self._writes = self.capacity > 0
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.capacity * self._record_bytes)  # sparse: disk is used as records are written
            self._file = os.open(self.path, os.O_RDWR)
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.capacity, self._record_bytes))

    @torch.no_grad()
    def hidden(self, blocks: Sequence[int], token_ids: Tensor) -> Tensor:
        """The target's last hidden states (B, T, d) on ``blocks`` with the tokens ``token_ids`` (B, T). The target runs
        only on blocks that aren't cached."""
        hidden = [self._read(block) for block in blocks]
        missing = [row for row, states in enumerate(hidden) if states is None]
        if missing:
            computed = self.target.hidden(token_ids[missing])
            for row, states in zip(missing, computed, strict=True):
                hidden[row] = self._store(blocks[row], states)
        return torch.stack([states for states in hidden if states is not None])

    def remove(self) -> None:
        """Delete the file."""
        if self.capacity:
            os.close(self._file)
            del self._bytes
            self.capacity, self._writes = 0, False
            self.path.unlink(missing_ok=True)

    def _read(self, block: int) -> Tensor | None:
        if block >= self.capacity:
            return None
        record = self._bytes[block].tobytes()
        data, checksum = record[: -_CHECKSUM.size], _CHECKSUM.unpack(record[-_CHECKSUM.size :])[0]
        if checksum != _checksum(block, data):
            return None
        states = torch.frombuffer(bytearray(data), dtype=self._dtype).reshape(self._shape)
        return states.to(self.target.device, self.target.dtype)

    def _store(self, block: int, states: Tensor) -> Tensor:
        """The states (T, d) as later passes will read them; values beyond the type's range aren't stored."""
        rounded = states.to(self._dtype)
        if block >= self.capacity or not bool(rounded.isfinite().all()):
            return states
        data = rounded.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        if self._writes:
            try:
                os.pwrite(self._file, data + _CHECKSUM.pack(_checksum(block, data)), block * self._record_bytes)
            except OSError as error:
                self._writes = False
                log.warning("no more of the target's hidden states are cached: %s", error)
        return rounded.to(states.dtype)


def _checksum(block: int, data: bytes) -> int:
    return _WRITTEN | zlib.crc32(data, block)
