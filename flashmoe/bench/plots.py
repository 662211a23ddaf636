"""Pictures of `bench decode`; matplotlib, an optional dependency, is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.base.errors import OptionError
from flashmoe.base.units import format_size
from flashmoe.bench.decode import DecodePoint, DecodeReport
from flashmoe.bench.pass_figures import PassFigures

SUFFIXES = (".png", ".svg")
# One colour per phase, in the order of `PassFigures.phases`.
COLOURS = ("#4c78a8", "#72b7b2", "#e45756", "#b0b0b0")


def check_plot(path: Path) -> None:
    """Raise OptionError unless a picture can be drawn and written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"a plot is a .png or .svg file, not {path.name}")
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent} is no folder to write a plot into")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("a plot needs matplotlib: pip install matplotlib")


def plot_decode(report: DecodeReport, path: Path) -> None:
    """Tokens per second against memory, and time per token by phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    speed, phases = figure.subplots(1, 2)
    speed.set_title("decode speed")
    speed.set_xlabel("memory (GB)")
    speed.set_ylabel("tokens per second, p10 to p90")
    for number, name in enumerate(dict.fromkeys(p.name for p in report.points[0].passes)):
        points = sorted(report.points, key=_memory)
        sizes = [_memory(point) / 1e9 for point in points]
        _draw_speeds(speed, sizes, [point.passes[number] for point in points], name)
    speed.set_ylim(bottom=0)
    speed.legend()
    bars = [(_label(point, taken), taken) for point in report.points for taken in point.passes]
    _draw_phases(phases, bars)
    figure.savefig(path, dpi=120)


def _memory(point: DecodePoint) -> int:
    """What a point was given, or else what it took."""
    return point.peak_memory_bytes if point.memory_bytes is None else point.memory_bytes


def _label(point: DecodePoint, taken: PassFigures) -> str:
    return f"{format_size(_memory(point))}\n{taken.name}"


def _errors(passes: Sequence[PassFigures]) -> list[list[float]]:
    """How far below and above the medians the percentiles are."""
    rates = [figures.tokens_per_second for figures in passes]
    return [
        [rate.median - rate.p10 for rate in rates],
        [rate.p90 - rate.median for rate in rates],
    ]


def _draw_speeds(axes: Any, sizes: list[float], passes: list[PassFigures], name: str) -> None:
    medians = [figures.tokens_per_second.median for figures in passes]
    axes.errorbar(sizes, medians, yerr=_errors(passes), marker="o", capsize=3, label=name)


def _draw_phases(axes: Any, bars: Sequence[tuple[str, PassFigures]]) -> None:
    axes.set_title("time per token")
    axes.set_ylabel("milliseconds")
    places = range(len(bars))
    bottoms = [0.0] * len(bars)
    for phase, colour in zip(bars[0][1].phases, COLOURS, strict=True):
        heights = [1000 * figures.phases[phase] for _, figures in bars]
        axes.bar(places, heights, bottom=bottoms, label=phase, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(list(places), [label for label, _ in bars])
    axes.legend(loc="upper right")
