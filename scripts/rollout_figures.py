"""What a benchmark of rollouts says of an arm at a batch size: medians, ratios to `off`, spreads.

Pure functions over measured rates, a table and a plot. Leaves out measuring (bench_rollout.py,
bench_sd.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

OFF, ADAPTIVE = "off", "adaptive"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An arm at a batch size, over all rounds."""

    batch_size: int
    arm: str
    tokens_per_s: float
    """Median."""
    ratio_to_off: float
    """Median of the rounds' ratios."""
    spread: tuple[float, float]
    """First and third quartile of the rounds' ratios."""


FigureT = TypeVar("FigureT", bound=Figure)


def ratio_and_spread(
    rates: Sequence[float], off_rates: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of the rounds' ratios; a list of rates has one a round."""
    ratios = [ours / off for ours, off in zip(rates, off_rates, strict=True)]
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return statistics.median(ratios), (quartiles[0], quartiles[2])


def by_batch_size(figures: Iterable[FigureT]) -> dict[int, dict[str, FigureT]]:
    """Figures by batch size and arm, in the order given."""
    sorted_out: dict[int, dict[str, FigureT]] = {}
    for figure in figures:
        sorted_out.setdefault(figure.batch_size, {})[figure.arm] = figure
    return sorted_out


def print_summary(figures: Iterable[Figure], fixed_arms: Collection[str]) -> None:
    """Adaptive against off and against the best fixed strategy, by batch size."""
    print(f"\n{'batch':>5} {'adaptive/off':>13} {'adaptive/best fixed':>20}  best fixed")
    for batch_size, arms in by_batch_size(figures).items():
        ratios: Mapping[str, float] = {name: one.ratio_to_off for name, one in arms.items()}
        best = max((name for name in ratios if name in fixed_arms), key=lambda name: ratios[name])
        adaptive = ratios[ADAPTIVE]
        print(f"{batch_size:>5} {adaptive:>13.2f} {adaptive / ratios[best]:>20.2f}  {best}")


def draw_ratios(axes: Any, figures: Iterable[Figure]) -> None:
    """Ratios to off over batch size, a line an arm, quartiles as bars."""
    by_arm: dict[str, list[Figure]] = {}
    for figure in figures:
        by_arm.setdefault(figure.arm, []).append(figure)
    for arm, points in by_arm.items():
        ratios = [point.ratio_to_off for point in points]
        bars = [
            [ratio - point.spread[0] for ratio, point in zip(ratios, points, strict=True)],
            [point.spread[1] - ratio for ratio, point in zip(ratios, points, strict=True)],
        ]
        is_adaptive = arm == ADAPTIVE
        axes.errorbar(
            [point.batch_size for point in points],
            ratios,
            yerr=[[max(bar, 0.0) for bar in side] for side in bars],
            label=arm,
            marker="o",
            linewidth=3 if is_adaptive else 1.2,
            capsize=2,
            zorder=3 if is_adaptive else 2,
        )
    axes.set(xscale="log", xlabel="live batch", ylabel="tokens per second, relative to off")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
