"""A picture of what a bandit does: batch sizes by strategies, each cell a gain and a share.

Colour and number are tokens a second over those of `off`: blue for faster, red for slower; in
brackets where that is believed, not measured, since the strategy was not run, or too seldom next to
`off`. Below stands the share of the batch size's steps that were decided for the strategy, alone
where no gain is known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fastrl.rollout.bandit import BanditReport

_DOTS_PER_INCH = 100
_COLOURS = "RdBu"
_WIDEST_GAIN = 4.0
"""Colours run from one over this to this."""


def heat_map(report: BanditReport) -> npt.NDArray[np.uint8]:
    """The picture.

    Args:
        report: of an RL step, with one bucket at least.

    Returns:
        Pixels, RGB, [height, width, 3].
    """
    strategies = list(report.arm_shares)
    buckets = list(report.buckets)
    gains_BS = np.full((len(buckets), len(strategies)), np.nan)
    figure = Figure(
        figsize=(2.2 + 0.95 * len(strategies), 1.5 + 0.55 * len(buckets)),
        dpi=_DOTS_PER_INCH,
        layout="constrained",
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, bucket in enumerate(report.buckets.values()):
        for column, strategy in enumerate(strategies):
            measured = bucket.arm_gains.get(strategy)
            gain = bucket.believed_gains.get(strategy) if measured is None else measured
            share = bucket.arm_shares[strategy]
            if gain is None and not share:
                continue
            gains_BS[row, column] = np.nan if gain is None else gain
            axes.text(
                column,
                row,
                _cell(gain, share, is_measured=measured is not None),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if gain is None or 1 / 2.2 < gain < 2.2 else "white",
            )
    image = axes.imshow(
        gains_BS, cmap=_COLOURS, norm=LogNorm(1 / _WIDEST_GAIN, _WIDEST_GAIN), aspect="auto"
    )
    axes.set_xticks(range(len(strategies)), strategies)
    axes.set_yticks(range(len(buckets)), [name.replace("_up", " up") for name in buckets])
    axes.set_xlabel("strategy (depth_topk_verify)")
    axes.set_ylabel("live batch size")
    axes.set_title("tokens/s over off (in brackets: not measured)\nshare of decisions", fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=[0.25, 0.5, 1, 2, 4])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.ax.minorticks_off()
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def _cell(gain: float | None, share: float, *, is_measured: bool) -> str:
    if gain is None:
        return f"{share:.0%}"
    return f"{gain:.2f}\n{share:.0%}" if is_measured else f"({gain:.2f})\n{share:.0%}"
