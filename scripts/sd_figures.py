"""What bench_sd.py says of its arms: tables and a plot of speeds, step times, accept lengths.

`break_even` is why step times are shown: so many tokens must a step of a strategy yield to be worth
its time. Pure but for printing. Leaves out medians and ratios (rollout_figures.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout_figures import ADAPTIVE, Figure, by_batch_size, draw_ratios
from sd_engines import SGLANG_ADAPTIVE, strategy_of


@dataclass(frozen=True, kw_only=True)
class EngineFigure(Figure):
    """An arm of an engine at a batch size, over all rounds."""

    engine: str
    accept_length: float
    """Median."""
    step_ms: float
    """Milliseconds of a decode step over the whole batch; median."""


def print_figures(figures: Iterable[EngineFigure]) -> None:
    """A line each."""
    header = ("batch", "arm", "tokens/s", "ratio", "[quartiles]", "accept", "step, ms")
    print("{:>5} {:>15} {:>9} {:>7} {:>12} {:>7} {:>9}".format(*header))
    for figure in figures:
        low, high = figure.spread
        print(
            f"{figure.batch_size:>5} {figure.arm:>15} {figure.tokens_per_s:>9.0f} "
            f"{figure.ratio_to_off:>7.2f} [{low:.2f}, {high:.2f}] "
            f"{figure.accept_length:>7.2f} {figure.step_ms:>9.2f}"
        )


def break_even(figures: Sequence[EngineFigure], off: str) -> dict[str, dict[int, float]]:
    """By fixed strategy and batch size, the accept length from which on it is faster than `off`:
    its step's time in units of a plain step's."""
    lengths: dict[str, dict[int, float]] = {}
    for batch_size, arms in by_batch_size(figures).items():
        for name, figure in arms.items():
            if strategy_of(name) is not None:
                length = figure.step_ms / arms[off].step_ms
                lengths.setdefault(name, {})[batch_size] = length
    return lengths


def print_step_costs(figures: Sequence[EngineFigure], off: str) -> None:
    """Milliseconds a step by strategy and batch size, and the accept length at which it pays."""
    steps = by_batch_size(figures)
    print(f"\nmilliseconds a step (accept length from which on it is faster than {off})")
    print(f"{'strategy':>15}" + "".join(f"{f'batch {size}':>16}" for size in steps))
    for name, lengths in break_even(figures, off).items():
        cells = (
            f"{steps[size][name].step_ms:.2f} ({lengths[size]:.2f})" if size in lengths else "-"
            for size in steps
        )
        print(f"{name:>15}" + "".join(f"{cell:>16}" for cell in cells))


def print_against_sglang(figures: Sequence[EngineFigure]) -> None:
    """Our adaptive arm against SGLang's own, by batch size."""
    print(f"\n{'batch':>5} {'adaptive/sglang_adaptive':>25}")
    for batch_size, arms in by_batch_size(figures).items():
        ratio = arms[ADAPTIVE].tokens_per_s / arms[SGLANG_ADAPTIVE].tokens_per_s
        print(f"{batch_size:>5} {ratio:>25.2f}")


def draw(figures: Sequence[EngineFigure], path: Path) -> None:
    """Tokens a second, and ratios to off, over batch size; a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (rates, ratios) = pyplot.subplots(ncols=2, figsize=(14, 5))
    draw_ratios(ratios, figures)
    arms = dict.fromkeys(figure.arm for figure in figures)
    for arm in arms:
        points = [figure for figure in figures if figure.arm == arm]
        rates.plot(
            [point.batch_size for point in points],
            [point.tokens_per_s for point in points],
            label=arm,
            marker="o",
            linewidth=3 if arm == ADAPTIVE else 1.2,
        )
    rates.set(xlabel="live batch", ylabel="tokens per second")
    rates.set_xscale("log", base=2)
    rates.set_yscale("log")
    rates.grid(alpha=0.3)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)
