"""Where randomness comes from, and Poisson sampling.

The guarantee assumes randomness that nobody can predict. Opacus's ``UniformWithReplacementSampler`` draws
the right distribution, but from a ``torch.Generator``: a Mersenne Twister, whose whole state follows from a
few hundred of its outputs, and the package that replaced it with a secure one (torchcsprng) is no longer
built. So the sampler here draws the same distribution from the operating system's generator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from post_client.privacy.randomness import RESOLUTION, Randomness
from post_shared.errors import PrivacyInvalid


class PoissonSampler:
    """Batches in which every one of ``examples`` rows (or users) is included independently with probability ``rate``.

    The size of a batch is random and may be 0. The accountant's amplification by sampling holds for exactly
    this: shuffled batches of fixed size are another mechanism, with a weaker guarantee.
    """

    def __init__(self, examples: int, rate: float, randomness: Randomness) -> None:
        if examples < 1:
            raise PrivacyInvalid(f"there must be at least one row to sample from, not {examples}")
        if not 0 < rate <= 1:
            raise PrivacyInvalid(f"a sampling rate lies above 0 and at most at 1; {rate} doesn't")
        self.examples = examples
        self.rate = rate
        self.randomness = randomness
        self._threshold = np.uint64(int(rate * RESOLUTION))  # rounded down: never more often than accounted for

    def draw(self, step: int) -> NDArray[np.int64]:
        """The indices of the rows in the batch of ``step``, ascending; often not ``examples * rate``, maybe none."""
        drawn = self.randomness.integers(self.examples, "sampling", step)
        return np.flatnonzero(drawn < self._threshold)
