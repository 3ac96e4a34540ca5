"""The privacy statement: what is guaranteed, how, and what isn't. It stays with the data owner.

Sampling rate and expected batch size give the number of rows away; only (ε, δ) go into the prompt file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from post_client.privacy.accounting import Unit
    from post_shared.data.rows import Row

NOT_COVERED = (
    "texts that you later send to the provider for predictions: it reads them",
    "the task form (template, labels, label words), which leaves as it is: choose it without looking at single rows",
    "other uses of the same rows: every further run on them adds its own epsilon, also runs whose prompt you discard "
    "after comparing scores",
    "the number of uploads and when they happen; uploading this same prompt again costs nothing more",
    "the number of rows (or users), which sets the sampling rate and delta and is taken as known",
    "public texts given to the run, which enter without noise: no private text may be among them",
)
BEYOND = {
    "row": "a person who wrote several rows: the unit is one row",
    "user": "a person who writes under several user names: the unit is one user",
}
"""What each unit leaves open."""


def words_of_unit(unit: Unit, average_iterates: bool) -> dict[str, Any]:
    """The members of a statement that say what is protected and how, for a unit and for the iterate that is kept."""
    whose = "per-row gradients" if unit == "row" else "the gradients of each user's rows are summed, these sums"
    result = "average of the iterates of the second half" if average_iterates else "last iterate"
    each = "row is" if unit == "row" else "user is, with all rows,"
    what = "one row" if unit == "row" else "all rows of one user"
    return {
        "unit": "one row (text and label)" if unit == "row" else "one user (all rows with that user's name)",
        "neighbours": f"data sets that differ by {what}, added or removed",
        "sampling": f"Poisson: every {each} in every batch independently with the sampling rate; "
        "empty batches are steps",
        "mechanism": f"PromptDPSGD: {whose} clipped, summed, Gaussian noise added once per step, {result}",
        "not_covered": (*NOT_COVERED, BEYOND[unit]),
    }


@dataclass(frozen=True)
class PrivacyStatement:
    """The guarantee of one tuned prompt, for an auditor: :meth:`words` to read, :meth:`json` to keep."""

    private: bool
    """False when the randomness was seeded: then there is no guarantee, whatever the numbers say."""
    epsilon: float
    """The stated budget: the noise was chosen so that no more is spent."""
    delta: float
    epsilon_spent: float
    """The accountant's bound for the whole run; at most ``epsilon``."""
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
    """Runs that share the budget, all of them charged, whichever prompt was taken."""
    also_public: int = 0
    """Private rows whose text is one of the run's public texts."""

    @property
    def claim(self) -> tuple[float, float] | None:
        """(ε, δ) for the prompt file; None if nothing may be claimed."""
        return (self.epsilon, self.delta) if self.private else None

    def json(self) -> str:
        """All members, and the statement in words."""
        document: dict[str, Any] = asdict(self) | {"words": self.words()}
        return json.dumps(document, indent=2, ensure_ascii=False)

    def words(self) -> str:
        """A paragraph for people, then what it doesn't cover."""
        one = self.unit.partition(" (")[0].replace("one", "any one")
        if self.private:
            first = (
                f"This prompt is ({self.epsilon:g}, {self.delta:g})-differentially private for {self.unit}: whoever "
                f"sees it learns almost the same with or without {one}. Accounted for: epsilon = "
                f"{self.epsilon_spent:.3f} by {self.accountant}."
            )
        else:
            first = (
                "NOT PRIVATE: the randomness was seeded, which is for tests only. Whoever knows or guesses the seed "
                f"can take the noise off. The numbers describe what a run with secure randomness would have spent: "
                f"epsilon = {self.epsilon_spent:.3f} at delta = {self.delta:g} by {self.accountant}."
            )
        if self.also_public:
            first += (
                f" BUT the public texts of the run, which enter without noise, have the texts of {self.also_public} "
                "private rows among them. Who is in such a text that was not public before is promised nothing."
            )
        trials = "" if self.trials == 1 else f" in each of {self.trials} trials, all charged"
        how = (
            f"Neighbouring: {self.neighbours}. Mechanism: {self.mechanism}. Sampling: {self.sampling}. Sampling rate "
            f"{self.sampling_rate:.6g}, {self.steps} steps{trials}, clipping norm {self.max_grad_norm:g}, noise multiplier "
            f"{self.noise_multiplier:.4f}, randomness: {self.randomness}."
        )
        limits = "\n".join(f"- {limit}" for limit in self.not_covered)
        libraries = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{first}\n{how}\nNot covered:\n{limits}\nComputed with {libraries}."


def also_public(rows: Iterable[Row], texts: Iterable[str]) -> int:
    """How many of the private ``rows`` have a text that is among ``texts``, whatever the spaces and the case."""
    known = set(map(_plain, texts))
    return sum(_plain(row.text) in known for row in rows)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def library_versions() -> dict[str, str]:
    """The libraries that the guarantee rests on."""
    return {name: version(name) for name in ("post-transfer", "opacus", "torch", "transformers", "numpy")}
