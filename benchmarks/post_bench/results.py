"""The figures of a benchmark: rows in a JSON file that is also its state, so that a run stopped anywhere goes on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from post_client.console import write_file
from post_shared.errors import DataInvalid, InvalidInput

Key = tuple[str, str, str, int]
"""(private, public, method, seed)"""
METHODS: dict[str, str] = {
    "zero_shot": "zero-shot (ZS): large model, no prompt",
    "calibrated_plain": "calibrated zero-shot, one question",
    "calibrated": "calibrated zero-shot: large model, label bias removed, an ensemble of instructions",
    "direct_reuse": "direct reuse (D): the student's prompt on the large model",
    "prompted_student": "prompted student (C)",
    "proxy": "proxy: the large model's logits plus the student's change",
    "untuned": "POST with a prompt that saw no private data",
    "paper": "transferred by the paper's loss",
    "post": "POST",
    "upper_bound": "prompt tuned on the large model (PT, forbidden)",
    "direct_reuse_dp": "direct reuse, DP",
    "prompted_student_dp": "prompted student, DP",
    "proxy_dp": "proxy, DP",
    "paper_dp": "the paper's loss, DP",
    "post_dp": "POST, DP",
}
"""Every method and what it is, in the order of the tables. The letters are the paper's columns."""
SIMPLE = ("calibrated", "prompted_student", "untuned")
"""What POST has to beat: what can be had without a transfer, or without private rows."""
MIN_GAP = 0.02
"""Pairs whose gap is smaller say nothing about the share of it that is closed."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """One accuracy on a private test set. ``seconds`` is what this method itself took, evaluation included."""

    private: str
    public: str
    method: str
    seed: int
    accuracy: float
    n_test: int
    seconds: float
    epsilon: float | None
    settings: dict[str, Any]
    right: str = ""
    """Which test rows were answered right, in their order: "1" or "0" each."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.private, self.public, self.method, self.seed


@dataclass
class Results:
    """The rows in ``path``; rows made with other settings are not ours and are refused, never mixed in."""

    path: Path
    about: dict[str, Any]
    rows: list[Figure] = field(default_factory=list)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, about: dict[str, Any]) -> Results:
        """Read what is there, if it is of the same ``about`` (target, data and settings) or has no rows yet.

        Raises:
            DataInvalid: the file is something else, or of other settings.
        """
        if not path.exists():
            return cls(path, about)
        try:
            document = json.loads(path.read_text("utf-8"))
            found = cls(path, document["about"], [Figure(**row) for row in document["rows"]], document["students"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataInvalid(f"{path} holds no results of this benchmark ({error}); name another file") from error
        if found.about != about:
            if not found.rows:
                return cls(path, about)
            other = sorted(name for name in about | found.about if about.get(name) != found.about.get(name))
            raise DataInvalid(f"{path} was made with other settings ({', '.join(other)}); name another file")
        return found

    def add(self, figure: Figure) -> None:
        self.rows.append(figure)
        self.save()

    def save(self) -> None:
        rows = [asdict(row) for row in self.rows]
        document = {"about": self.about, "students": self.students, "rows": rows}
        document |= {"summary": summary(self.rows), "overall": overall(self.rows)}
        write_file(self.path, (json.dumps(document, indent=1) + "\n").encode())

    def missing(self, wanted: Iterable[tuple[str, str, str, int]]) -> list[tuple[str, str, str, int]]:
        done = {row.key for row in self.rows}
        return [key for key in wanted if key not in done]

    def seconds_left(self, missing: Iterable[tuple[str, str, str, int]]) -> float | None:
        """What the missing rows will take by the mean of their methods so far; None while nothing is known.

        A method that hasn't been timed yet counts as much as the others do on average.
        """
        known: dict[str, list[float]] = {}
        for row in self.rows:
            known.setdefault(row.method, []).append(row.seconds)
        if not known:
            return None
        means = {method: statistics.fmean(seconds) for method, seconds in known.items()}
        usual = statistics.fmean(means.values())
        return sum(means.get(method, usual) for _, _, method, _ in missing)


def gap_share(accuracy: float, calibrated: float | None, upper_bound: float | None) -> float | None:
    """Share of the way from calibrated zero-shot to the upper bound: what private rows add, of all they could add."""
    if calibrated is None or upper_bound is None or upper_bound - calibrated < MIN_GAP:
        return None
    return (accuracy - calibrated) / (upper_bound - calibrated)


Cells = dict[tuple[str, str], dict[str, list[Figure]]]
"""The figures of each pair by method, one a seed."""


def cells_of(rows: Sequence[Figure]) -> Cells:
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row.private, row.public), {}).setdefault(row.method, []).append(row)
    return cells


def summary(rows: Sequence[Figure]) -> list[dict[str, Any]]:
    """Mean over seeds of each pair and method, with intervals.

    ``deviation`` is the spread over seeds; ``low`` and ``high`` the 95 % interval of the mean by bootstrap over test
    rows; ``gain`` what a method has over the best of :data:`SIMPLE`, with the interval of the paired difference.
    """
    found = []
    for (private, public), methods in cells_of(rows).items():
        means = {name: statistics.fmean(row.accuracy for row in some) for name, some in methods.items()}
        for method in (name for name in METHODS if name in methods):
            some = methods[method]
            spread = statistics.stdev(row.accuracy for row in some) if len(some) > 1 else None
            low, high = interval(hits(some)) or (None, None)
            found.append(
                {
                    "private": private,
                    "public": public,
                    "method": method,
                    "accuracy": means[method],
                    "deviation": spread,
                    "low": low,
                    "high": high,
                    "seeds": len(some),
                    "n_test": some[0].n_test,
                    "seconds": statistics.fmean(row.seconds for row in some),
                    "gap_share": gap_share(means[method], means.get("calibrated"), means.get("upper_bound")),
                    **_gain(method, methods, means),
                }
            )
    return found


def _gain(method: str, methods: dict[str, list[Figure]], means: dict[str, float]) -> dict[str, Any]:
    """Over the best simple alternative of the same privacy; nothing for the alternatives themselves."""
    private = method.endswith("_dp")
    others = [f"{name}_dp" if private and name == "prompted_student" else name for name in SIMPLE]
    there = [name for name in others if name in means and name != method]
    if not there or method in SIMPLE or not method.startswith(("post", "paper", "proxy", "direct_reuse")):
        return {}
    best = max(there, key=means.__getitem__)
    mine, theirs = hits(methods[method]), hits(methods[best])
    paired = interval(mine - theirs) if mine is not None and theirs is not None and len(mine) == len(theirs) else None
    low, high = paired or (None, None)
    return {"over": best, "gain": means[method] - means[best], "gain_low": low, "gain_high": high}


def overall(rows: Sequence[Figure]) -> dict[str, float]:
    """By method: the sum of gains over calibrated zero-shot as a share of the sum of gaps, over pairs with a gap."""
    gains: dict[str, float] = {}
    gap = 0.0
    for methods in cells_of(rows).values():
        means = {name: statistics.fmean(row.accuracy for row in some) for name, some in methods.items()}
        low, high = means.get("calibrated"), means.get("upper_bound")
        if low is None or high is None or high - low < MIN_GAP:
            continue
        gap += high - low
        for name, mean in means.items():
            gains[name] = gains.get(name, 0.0) + mean - low
    return {name: gain / gap for name, gain in gains.items()} if gap else {}


def hits(some: Sequence[Figure]) -> NDArray[np.float64] | None:
    """Share of the seeds that answered each test row right, (N,); None for figures of before rows were kept."""
    if not some or any(len(row.right) != row.n_test for row in some):
        return None
    bits: NDArray[np.float64] = np.array([[float(bit) for bit in row.right] for row in some])
    mean: NDArray[np.float64] = bits.mean(0)
    return mean


def interval(values: NDArray[np.float64] | None) -> tuple[float, float] | None:
    """The 95 % interval of the mean of ``values`` (N,), by bootstrap over rows."""
    if values is None:
        return None
    generator = np.random.default_rng(0)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(rows: Sequence[Figure]) -> str:
    """The summary as a Markdown table: one line a method, one column a pair."""
    cells = {(each["private"], each["public"], each["method"]): each for each in summary(rows)}
    columns = list(dict.fromkeys((private, public) for private, public, _ in cells))
    lines = ["| private ← public | " + " | ".join(f"{a} ← {b}" for a, b in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    show: Callable[[dict[str, Any] | None], str] = lambda each: _cell(each) if each else ""  # noqa: E731
    for method, what in METHODS.items():
        if any((*column, method) in cells for column in columns):
            values = [show(cells.get((*column, method))) for column in columns]
            lines.append(f"| {what} | " + " | ".join(values) + " |")
    shares = {name: share for name, share in overall(rows).items() if "post" in name or name.startswith("prompted")}
    if shares:
        told = ", ".join(f"{METHODS[name]} {share:.2f}" for name, share in shares.items())
        lines += ["", f"Share of the gap from calibrated zero-shot to the upper bound, over all pairs: {told}."]
    return "\n".join(lines) + "\n"


def _cell(each: dict[str, Any]) -> str:
    """Mean ± spread over seeds [interval over rows] (gain over the best simple alternative, with its interval)."""
    spread = f" ± {each['deviation']:.3f}" if each["deviation"] is not None else ""
    rows = f" [{each['low']:.3f}, {each['high']:.3f}]" if each["low"] is not None else ""
    gain = ""
    if each.get("gain") is not None and "post" in each["method"]:
        around = f" [{each['gain_low']:+.3f}, {each['gain_high']:+.3f}]" if each["gain_low"] is not None else ""
        gain = f" ({each['gain']:+.3f}{around})"
    return f"{each['accuracy']:.3f}{spread}{rows}{gain}"


def check_picture(path: Path) -> None:
    """Raise :class:`InvalidInput` if no picture can be written under that name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise InvalidInput(f"{path} is no kind of picture that can be drawn; there are: {', '.join(sorted(kinds))}")


def draw(rows: Sequence[Figure], path: Path) -> None:
    """One group of bars a pair, one bar a method, with the spread over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    cells = summary(rows)
    columns = list(dict.fromkeys((each["private"], each["public"]) for each in cells))
    methods = [name for name in METHODS if any(each["method"] == name for each in cells)]
    canvas = Canvas(figsize=(2 + 2.4 * len(columns), 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    width = 0.8 / len(methods)
    for at, method in enumerate(methods):
        some = {(each["private"], each["public"]): each for each in cells if each["method"] == method}
        places = [place + at * width for place, column in enumerate(columns) if column in some]
        chosen = [some[column] for column in columns if column in some]
        axes.bar(
            places,
            [each["accuracy"] for each in chosen],
            width,
            yerr=[each["deviation"] or 0.0 for each in chosen],
            label=METHODS[method],
            color=f"C{at}",
        )
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(columns))])
    axes.set_xticklabels([f"{private}\n← {public}" for private, public in columns])
    axes.set_ylabel("accuracy on the private test set")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)
