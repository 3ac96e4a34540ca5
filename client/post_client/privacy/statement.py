"""The privacy statement: what is guaranteed, how, and what isn't. It stays with the data owner.

Sampling rate and expected batch size reveal the number of rows; only (ε, δ) go into the prompt file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from post_client.privacy.text_identity import normalized

if TYPE_CHECKING:
    from post_client.privacy.accounting import Unit
    from post_shared.data.rows import Row

NOT_COVERED = (
    "texts that you later send to the provider for predictions: it reads them",
    "the task (template, labels, label words), which is sent unchanged: don't choose it by looking at single rows",
    "other uses of the same rows: every further run on them adds its own epsilon, even if you discard its prompt after "
    "comparing scores",
    "the number and time of uploads; uploading this same prompt again costs nothing more",
    "the number of rows (or users), which determines the sampling rate and delta and is assumed to be known",
    "public texts given to the run, which are used without noise: no private text may be among them",
)
NOT_COVERED_BY_UNIT = {
    "row": "a person who wrote several rows: the unit is one row",
    "user": "a person who writes under several user names: the unit is one user",
}
"""What the guarantee for each unit doesn't cover."""


def words_of_unit(unit: Unit, average_iterates: bool) -> dict[str, Any]:
    """The members of a statement that describe what is protected and how, for a unit and the returned iterate."""
    gradients = "per-row gradients are" if unit == "row" else "each user's gradients are summed, these sums are"
    result = "average of the second half's iterates" if average_iterates else "last iterate"
    sampled = "row" if unit == "row" else "user, with all of the user's rows,"
    difference = "one row" if unit == "row" else "all rows of one user"
    return {
        "unit": "one row (text and label)" if unit == "row" else "one user (all rows with that user's name)",
        "neighbours": f"data sets that differ by {difference}, added or removed",
        "sampling": f"Poisson: every {sampled} is in every batch independently with the sampling rate; "
        "empty batches are steps",
        "mechanism": f"PromptDPSGD: {gradients} clipped and summed, Gaussian noise is added once per step; {result}",
        "not_covered": (*NOT_COVERED, NOT_COVERED_BY_UNIT[unit]),
    }


@dataclass(frozen=True)
class PrivacyStatement:
    """The privacy guarantee of one tuned prompt, as text (:meth:`words`) or as JSON (:meth:`json`)."""

    private: bool
    """False if the randomness was seeded: then there is no guarantee, whatever the numbers are."""
    epsilon: float
    """The budget: the noise was chosen so that no more is spent."""
    delta: float
    epsilon_spent: float
    """The accountant's bound for all trials; at most ``epsilon``."""
    accountant: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    max_grad_norm: float
    expected_batch_size: float
    randomness: str
    versions: dict[str, str]
    unit: str
    neighbours: str
    sampling: str
    mechanism: str
    not_covered: tuple[str, ...]
    trials: int = 1
    """Runs that share the budget; all of them are charged, whichever prompt was kept."""
    also_public: int = 0
    """Private rows whose text is one of the run's public texts."""

    @property
    def claim(self) -> tuple[float, float] | None:
        """(ε, δ) for the prompt file; None without a guarantee."""
        return (self.epsilon, self.delta) if self.private else None

    def json(self) -> str:
        """All members, and the statement as text."""
        document: dict[str, Any] = asdict(self) | {"words": self.words()}
        return json.dumps(document, indent=2, ensure_ascii=False)

    def words(self) -> str:
        """The statement as text, then what it doesn't cover."""
        one = self.unit.partition(" (")[0].replace("one", "any one")
        if self.private:
            first = (
                f"This prompt is ({self.epsilon:g}, {self.delta:g})-differentially private for {self.unit}: anyone "
                f"who sees it learns almost the same with or without {one}. Accounted for: epsilon = "
                f"{self.epsilon_spent:.3f} by {self.accountant}."
            )
        else:
            first = (
                "NOT PRIVATE: the randomness was seeded, which is for tests only. Anyone who knows or guesses the seed "
                f"can remove the noise. The numbers describe what a run with secure randomness would have spent: "
                f"epsilon = {self.epsilon_spent:.3f} at delta = {self.delta:g} by {self.accountant}."
            )
        if self.also_public:
            first += (
                f" BUT the public texts of the run, which are used without noise, include the texts of "
                f"{self.also_public} private rows. These rows have no guarantee, unless their texts were public before."
            )
        trials = "" if self.trials == 1 else f" in each of {self.trials} trials, all charged"
        details = (
            f"Neighbouring: {self.neighbours}. Mechanism: {self.mechanism}. Sampling: {self.sampling}. Sampling rate "
            f"{self.sampling_rate:.6g}, {self.steps} steps{trials}, clipping norm {self.max_grad_norm:g}, noise "
            f"multiplier {self.noise_multiplier:.4f}, randomness: {self.randomness}."
        )
        limits = "\n".join(f"- {limit}" for limit in self.not_covered)
        libraries = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{first}\n{details}\nNot covered:\n{limits}\nComputed with {libraries}."


def also_public(rows: Iterable[Row], texts: Iterable[str]) -> int:
    """The number of private ``rows`` whose text is in ``texts``, as the ledger identifies rows."""
    known = set(map(normalized, texts))
    return sum(normalized(row.text) in known for row in rows)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the guarantee depends on."""
    return {name: version(name) for name in ("post-transfer", "opacus", "torch", "transformers", "numpy")}
