"""LiRA, the likelihood ratio attack (Carlini et al. 2022), with each shadow prompt in turn as the attacked one (§5.4).

For each row, one Gaussian is fitted to the confidences of the prompts that were tuned on it and one to those of the
others. The attack compares their likelihoods at the attacked prompt's confidence, which takes no part in the fit.
Shapes: K prompts, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from post_shared.errors import InvalidInput
from post_shared.method.audit.roc import RESAMPLES, Curve, Numbers, Ranking, estimate, interval
from post_shared.schemas.reports import Estimate

Members = NDArray[np.bool_]
"""(K, N): whether prompt k was tuned on row i."""


Variant = Literal["online", "offline"]
VARIANTS: tuple[Variant, ...] = ("online", "offline")
MIN_PROMPTS = 4
MIN_ROWS = 8
FALSE_POSITIVE_RATES = (0.001, 0.01)
"""At which attacks are compared (Carlini et al. 2022)."""


def check_size(prompts: int, rows: int) -> None:
    """Raise :class:`InvalidInput` if there are too few prompts or rows to fit and compare."""
    if prompts < MIN_PROMPTS or rows < MIN_ROWS:
        raise InvalidInput(
            f"LiRA needs at least {MIN_PROMPTS} shadow prompts and {MIN_ROWS} rows, not {prompts} and {rows}"
        )


def likelihood_ratios(confidences: Numbers, members: Members) -> dict[Variant, Numbers]:
    """Membership scores of each row for each prompt, fitted on all *other* prompts: (K, N), NaN if these are too few.

    ``online``: log ratio of the two Gaussians' densities at the attacked prompt's confidence. ``offline`` uses only
    prompts that weren't tuned on the row: how many standard deviations the attacked prompt lies above their mean.
    The variances are pooled over the rows, as the authors advise for few shadow models.
    """
    centred = confidences - confidences.mean(0)  # a row's level cancels out; the sums of squares stay exact
    mean_in, deviation_in = _leave_one_out(centred, members)
    mean_out, deviation_out = _leave_one_out(centred, ~members)
    z_in, z_out = (centred - mean_in) / deviation_in, (centred - mean_out) / deviation_out
    ratio = 0.5 * (z_out**2 - z_in**2) + np.log(deviation_out / deviation_in)
    return {"online": ratio, "offline": np.where(np.isnan(ratio), np.nan, z_out)}


def _leave_one_out(values: Numbers, chosen: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Mean (K, N) and pooled deviation (K, 1) of the chosen values of each row, without each prompt's own."""
    weight = chosen.astype(float)
    count = weight.sum(0) - weight
    total = (weight * values).sum(0) - weight * values
    squares = (weight * values**2).sum(0) - weight * values**2
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
    squared_error = np.where(count > 0, squares - total * np.nan_to_num(mean), 0.0).clip(0.0).sum(1)
    degrees_of_freedom = (count - 1).clip(0.0).sum(1)
    deviation = np.sqrt(squared_error / degrees_of_freedom.clip(1.0)).clip(1e-9)
    return mean, deviation[:, None]


@dataclass(frozen=True)
class Attack:
    """The result of one variant of LiRA over all pairs of an attacked prompt and a row."""

    variant: Variant
    auc: Estimate
    true_positives: Mapping[float, Estimate]
    """True positive rate by false positive rate."""
    chance: tuple[float, float]
    """Interval of the AUC, with the same confidence, if the prompts leak nothing about their rows."""
    p_value: float
    """Probability of this AUC or a larger one if nothing leaks."""
    members: int
    others: int
    curve: Curve


def attack(
    confidences: Numbers, members: Members, variant: Variant, *, confidence: float = 0.95, seed: int = 0
) -> Attack:
    """Run LiRA against each prompt, fitted on the others.

    The result has two kinds of uncertainty. The intervals of AUC and true positive rates resample both rows and prompts
    (pairs aren't independent, so a Clopper-Pearson interval would be too narrow). ``chance`` and ``p_value`` redraw the
    memberships and attack again: an exact test of "nothing leaks".

    Raises:
        InvalidInput: too few prompts or rows; see :func:`check_size`.
    """
    prompts, rows = confidences.shape
    check_size(prompts, rows)
    ranking, keep = _ranked(confidences, members, variant)
    curve = ranking.curve()
    generator = np.random.default_rng(seed)
    resampled = [ranking.curve(_weights(keep, generator)) for _ in range(RESAMPLES)]
    aucs = np.array([sample.auc for sample in resampled])
    redrawn = [random_halves(prompts, rows, int(generator.integers(2**62))) for _ in range(RESAMPLES // 5)]
    chance = np.array([_ranked(confidences, halves, variant)[0].curve().auc for halves in redrawn])
    return Attack(
        variant=variant,
        auc=estimate(curve.auc, aucs, confidence),
        true_positives={
            rate: estimate(curve.at(rate), np.array([sample.at(rate) for sample in resampled]), confidence)
            for rate in FALSE_POSITIVE_RATES
        },
        chance=interval(chance, confidence),
        p_value=float((1 + (chance >= curve.auc).sum()) / (1 + len(chance))),
        members=int(ranking.members.sum()),
        others=int((~ranking.members).sum()),
        curve=curve,
    )


def _ranked(confidences: Numbers, members: Members, variant: Variant) -> tuple[Ranking, NDArray[np.bool_]]:
    ratios = likelihood_ratios(confidences, members)[variant]
    keep = np.isfinite(ratios)
    return Ranking(ratios[keep], members[keep]), keep


def _weights(keep: NDArray[np.bool_], generator: np.random.Generator) -> Numbers:
    """Weights of the kept pairs when prompts and rows are each resampled with replacement (Owen 2007)."""
    prompts, rows = keep.shape
    prompt_counts = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts)
    row_counts = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    return (prompt_counts[:, None] * row_counts)[keep].astype(float)


def random_halves(prompts: int, rows: int, seed: int) -> Members:
    """A random half of the rows for each prompt, drawn independently.

    If each row were given to exactly half of the prompts, the number of other prompts with the row would reveal whether
    the attacked one has it.
    """
    generator = np.random.default_rng(seed)
    members = np.zeros((prompts, rows), dtype=bool)
    for row in members:
        row[generator.permutation(rows)[: rows // 2]] = True
    return members
