"""Poisson sampling from secure randomness.

The guarantee assumes unpredictable randomness. Opacus's ``UniformWithReplacementSampler`` draws the right distribution
from a ``torch.Generator``. That is a Mersenne Twister, whose state can be recovered from a few hundred outputs, and the
package that replaced it with a secure generator (torchcsprng) is no longer built. So this sampler draws the same
distribution from the operating system's generator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from post_client.privacy.randomness import RESOLUTION, Randomness
from post_shared.errors import PrivacyInvalid


class PoissonSampler:
    """Batches that include each of ``examples`` rows (or users) independently with probability ``rate``.

    A batch has a random size and may be empty. Amplification by sampling holds for exactly this scheme; shuffled
    batches of a fixed size are another mechanism with a weaker guarantee.
    """

    def __init__(self, examples: int, rate: float, randomness: Randomness) -> None:
        if examples < 1:
            raise PrivacyInvalid(f"there must be at least one row to sample from, not {examples}")
        if not 0 < rate <= 1:
            raise PrivacyInvalid(f"the sampling rate is {rate}; it must be above 0 and at most 1")
        self.examples = examples
        self.rate = rate
        self.randomness = randomness
        self._threshold = np.uint64(int(rate * RESOLUTION))  # rounded down: never above the rate accounted for

    def draw(self, step: int) -> NDArray[np.int64]:
        """The row (or user) indices of the batch at ``step``, ascending; possibly none."""
        drawn = self.randomness.integers(self.examples, "sampling", step)
        return np.flatnonzero(drawn < self._threshold)
