"""Sources of randomness."""

from __future__ import annotations

import hashlib
import os
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from post_shared.errors import PrivacyInvalid

RESOLUTION = 2**53
"""Uniform numbers are multiples of 1/2**53, the spacing of float64 in [0.5, 1)."""

KEY_BYTES = 32


class Randomness(Protocol):
    """Uniform random integers for a ``purpose`` at a ``step``. Only a ``private`` source gives a guarantee."""

    private: bool
    name: str

    def integers(self, count: int, purpose: str, step: int) -> NDArray[np.uint64]:
        """``count`` independent integers, uniform in [0, 2**53)."""
        ...


class SecureRandomness:
    """The operating system's cryptographically secure generator (``os.urandom``), fresh on every call."""

    private: bool = True
    name: str = "operating system (os.urandom)"

    def integers(self, count: int, purpose: str, step: int) -> NDArray[np.uint64]:
        return _to_integers(os.urandom(8 * count))


class KeyedRandomness:
    """A function of (key, purpose, step): a restarted run draws the same batches and the same noise.

    As secure as its key, which comes from :func:`new_key`, is never shown, and is deleted when the run is finished.
    """

    private: bool = True
    name: str = "operating system (os.urandom), stretched by SHAKE-256"

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise PrivacyInvalid(f"a randomness key must have {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    def integers(self, count: int, purpose: str, step: int) -> NDArray[np.uint64]:
        return _to_integers(hashlib.shake_256(self._key + f"{purpose}/{step}".encode()).digest(8 * count))


def new_key() -> bytes:
    """A new secret key for :class:`KeyedRandomness` from the operating system."""
    return os.urandom(KEY_BYTES)


def trial_key(key: bytes, trial: int) -> bytes:
    """The key of one of several runs that share a reservation. Each draws different numbers."""
    return hashlib.blake2b(f"trial/{trial}".encode(), key=key, digest_size=KEY_BYTES).digest()


class SeededRandomness:
    """For tests only: a function of (seed, purpose, step), so runs are reproducible. Its results are not private.

    Anyone who knows or guesses the seed can remove the noise; every output states that.
    """

    private: bool = False
    name: str = "seeded (for tests, not private)"
    _separator: ClassVar[str] = "/"

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def integers(self, count: int, purpose: str, step: int) -> NDArray[np.uint64]:
        label = self._separator.join((str(self.seed), purpose, str(step)))
        return _to_integers(hashlib.shake_256(label.encode()).digest(8 * count))


def _to_integers(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data, dtype="<u8") >> np.uint64(11)  # 64 bits -> the upper 53
