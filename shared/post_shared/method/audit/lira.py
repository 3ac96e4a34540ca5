"""LiRA, the likelihood ratio attack (Carlini et al. 2022), with every shadow prompt in turn as the target.

For each row, the confidences of the prompts that saw it are one Gaussian and those of the others another one. The
attack asks which of the two the target's confidence fits. The target never helps to fit them.
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
LEAST_PROMPTS = 4
LEAST_ROWS = 8
FALSE_ALARMS = (0.001, 0.01)
"""The false positive rates at which attacks are compared (Carlini et al. 2022)."""


def check_size(prompts: int, rows: int) -> None:
    """Raise :class:`InvalidInput` when there is too little to fit and compare."""
    if prompts < LEAST_PROMPTS or rows < LEAST_ROWS:
        raise InvalidInput(
            f"LiRA needs {LEAST_PROMPTS} shadow prompts and {LEAST_ROWS} rows at least, not {prompts} and {rows}"
        )


def likelihood_ratios(confidences: Numbers, members: Members) -> dict[Variant, Numbers]:
    """How likely each row is a member of each prompt by all *other* prompts, (K, N); NaN where those can't say.

    ``online``: log of the ratio of the two Gaussians' densities at the target's confidence. ``offline`` knows only
    prompts that did not see the row: how many standard deviations the target lies above them.
    The variances are pooled over the rows, as the authors advise for few shadow models.
    """
    centred = confidences - confidences.mean(0)  # a row's own level cancels; the sums of squares stay exact
    mean_in, deviation_in = _others(centred, members)
    mean_out, deviation_out = _others(centred, ~members)
    from_in, from_out = (centred - mean_in) / deviation_in, (centred - mean_out) / deviation_out
    ratio = 0.5 * (from_out**2 - from_in**2) + np.log(deviation_out / deviation_in)
    return {"online": ratio, "offline": np.where(np.isnan(ratio), np.nan, from_out)}


def _others(values: Numbers, chosen: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Of the chosen values of each row without the target's own: mean (K, N) and pooled deviation (K, 1)."""
    own = chosen.astype(float)
    count = own.sum(0) - own
    total = (own * values).sum(0) - own * values
    squares = (own * values**2).sum(0) - own * values**2
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
    spread = np.where(count > 0, squares - total * np.nan_to_num(mean), 0.0).clip(0.0).sum(1)
    freedom = (count - 1).clip(0.0).sum(1)
    deviation = np.sqrt(spread / freedom.clip(1.0)).clip(1e-9)
    return mean, deviation[:, None]


@dataclass(frozen=True)
class Attack:
    """What one variant of LiRA reaches over all pairs of a target prompt and a row."""

    variant: Variant
    auc: Estimate
    true_positives: Mapping[float, Estimate]
    """The share of members found, by the false positive rate allowed."""
    chance: tuple[float, float]
    """Where the AUC lies, with the same confidence, if prompts tell nothing of their rows."""
    p_value: float
    """How often chance alone reaches this AUC or more."""
    members: int
    others: int
    curve: Curve


def attack(
    confidences: Numbers, members: Members, variant: Variant, *, confidence: float = 0.95, seed: int = 0
) -> Attack:
    """Run LiRA against every prompt by means of the others.

    Two kinds of uncertainty are given. The intervals of AUC and true positives resample rows and prompts together
    (a pair depends on both, so pairs are no independent draws; Clopper and Pearson's interval would be too narrow).
    ``chance`` and ``p_value`` draw the memberships anew and attack again: an exact test of "nothing leaks".
    """
    prompts, rows = confidences.shape
    check_size(prompts, rows)
    ranking, keep = _ranked(confidences, members, variant)
    curve = ranking.curve()
    generator = np.random.default_rng(seed)
    resampled = [ranking.curve(_weights(keep, generator)) for _ in range(RESAMPLES)]
    aucs = np.array([each.auc for each in resampled])
    drawn = [random_halves(prompts, rows, int(generator.integers(2**62))) for _ in range(RESAMPLES // 5)]
    chance = np.array([_ranked(confidences, each, variant)[0].curve().auc for each in drawn])
    return Attack(
        variant=variant,
        auc=estimate(curve.auc, aucs, confidence),
        true_positives={
            rate: estimate(curve.at(rate), np.array([each.at(rate) for each in resampled]), confidence)
            for rate in FALSE_ALARMS
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
    """How often each kept pair is in a resample of prompts and rows, each with replacement (Owen 2007)."""
    prompts, rows = keep.shape
    often_prompt = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts)
    often_row = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    return (often_prompt[:, None] * often_row)[keep].astype(float)


def random_halves(prompts: int, rows: int, seed: int) -> Members:
    """A random half of the rows for each prompt.

    Drawn independently. Were each row given to exactly half of the prompts, then the number of other prompts that
    have it would betray whether this one has.
    """
    generator = np.random.default_rng(seed)
    members = np.zeros((prompts, rows), dtype=bool)
    for own in members:
        own[generator.permutation(rows)[: rows // 2]] = True
    return members
