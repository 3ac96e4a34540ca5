"""The results of ``post bench speed``: a JSON document, a table, a plot, and a comparison with earlier results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from post_bench.speed.bench import Part
from post_bench.speed.journey import journey
from post_client.console import write_file
from post_shared.errors import DataInvalid

JOURNEY = ("transfer", "transfer_constants", "tune_whole", "tune_target")
"""The parts of the journey."""


@dataclass
class Speed:
    """All measurements; ``about`` describes the machine and the models."""

    about: dict[str, Any]
    parts: dict[str, Part] = field(default_factory=dict)
    memory: dict[str, float] | None = None
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The main figures; None for those that weren't measured."""
        legs = journey(self.parts) if all(name in self.parts for name in JOURNEY) else None
        return {
            "transfer_vs_published": self._ratio("transfer", "published"),
            "share_of_limit": {name: self._share(name) for name in ("transfer", "distil")},
            "dp_vs_plain": self._ratio("tune", "private"),
            "tune_vs_peft": self._ratio("tune", "peft"),
            "predict_vs_peft": self._ratio("predict", "peft"),
            "generate_vs_peft": self._ratio("generate", "peft"),
            "journey_vs_target": legs["vs_target"] if legs else None,
            "transfer_memory_ratio": self.memory["ratio"] if self.memory else None,
            "journey": legs,
        }

    def document(self) -> dict[str, Any]:
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return {
            **self.figures(),
            "about": self.about,
            "parts": parts,
            "memory": self.memory,
            "curves": self.curves,
        }

    def save(self, path: Path) -> None:
        write_file(path, (json.dumps(_rounded(self.document()), indent=1) + "\n").encode())

    def _ratio(self, part: str, way: str) -> float | None:
        return self.parts[part].ratios[way] if part in self.parts else None

    def _share(self, part: str) -> float | None:
        return self.parts[part].ways["post"].share if part in self.parts else None


def read(path: Path) -> dict[str, Any]:
    """Earlier results.

    Raises:
        DataInvalid: the file has no such results.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not isinstance(document["parts"], dict):
            raise TypeError("'parts' is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataInvalid(f"{path} has no results of post bench speed ({error})") from error
    return document


def flat(document: Mapping[str, Any]) -> dict[str, float]:
    """Figures by dotted name, including the seconds of POST's steps."""
    figures: dict[str, float] = {}
    for name, value in document.items():
        if name in {"about", "parts", "memory", "curves", "journey"}:
            continue
        inner = value if isinstance(value, dict) else {"": value}
        figures |= {f"{name}.{key}".rstrip("."): figure for key, figure in inner.items() if figure is not None}
    for name, part in document["parts"].items():
        figures[f"{name}.seconds"] = part["ways"]["post"]["seconds"]
    return figures


def compared(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The figures of both documents and their ratios, as a Markdown table."""
    new, old = flat(now), flat(before)
    lines = ["| figure | before | now | now / before |", "|---|---|---|---|"]
    for name in [name for name in new if name in old]:
        ratio = f"{new[name] / old[name]:.3f}" if old[name] else ""
        lines.append(f"| {name} | {old[name]:.4g} | {new[name]:.4g} | {ratio} |")
    rates = (_rate(before), _rate(now))
    if all(rates):
        lines.append(f"| matrix rate, GFLOP/s | {rates[0]:.4g} | {rates[1]:.4g} | {rates[1] / rates[0]:.3f} |")
    return "\n".join(lines) + "\n"


def _rate(document: Mapping[str, Any]) -> float:
    rates = [part["matrix_rate"] / 1e9 for part in document["parts"].values()]
    return sum(rates) / len(rates) if rates else 0.0


def table(speed: Speed) -> str:
    """A Markdown table of all parts, with a line per implementation."""
    head = ("part", "way", "seconds", "times POST's", "tokens/s", "GFLOP needed", "share of the limit", "peak MB")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, part in speed.parts.items():
        for way, timing in part.ways.items():
            cells = [name, way, f"{timing.seconds:.3f}", f"{part.ratios.get(way, 1.0):.2f}"]
            cells += [f"{timing.tokens_per_second:.0f}", _or_empty(timing.flop, "{:.1f}", 1e9)]
            cells += [_or_empty(timing.share, "{:.2f}"), f"{timing.peak_bytes / 1e6:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    figures = flat({**speed.figures(), "parts": {}})
    lines += ["", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def _or_empty(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def _rounded(value: Any) -> Any:
    """Five significant digits: timings aren't more precise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def draw(speed: Speed, path: Path) -> None:
    """Plot the references' times relative to POST, the shares of the limit, and the cost curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 1 + (len(speed.curves) + 2) // 3
    canvas = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(rows, 3)
    bars = canvas.add_subplot(grid[0, :2])
    ratios = [(f"{name}\n{way}", ratio) for name, part in speed.parts.items() for way, ratio in part.ratios.items()]
    bars.bar(range(len(ratios)), [ratio for _, ratio in ratios])
    bars.axhline(1.0, color="black", linewidth=0.8)
    bars.set_xticks(range(len(ratios)), [name for name, _ in ratios], fontsize=7)
    bars.set_ylabel("times longer than POST")
    shares = canvas.add_subplot(grid[0, 2])
    by_part = [(name, part.ways["post"].share) for name, part in speed.parts.items()]
    shares.barh([name for name, _ in by_part], [share or 0.0 for _, share in by_part])
    shares.set_xlim(0, 1)
    shares.set_xlabel("share of the matrix rate")
    for index, (name, points) in enumerate(speed.curves.items()):
        axes = canvas.add_subplot(grid[1 + index // 3, index % 3])
        axes.plot([point["value"] for point in points], [point["seconds"] for point in points], marker="o")
        axes.set(xlabel=name.replace("_", " "), ylabel="seconds", ylim=(0, None))
    for axes in canvas.axes:
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)
