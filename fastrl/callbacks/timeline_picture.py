"""A picture of an RL step: time to the right, a row for each rank, a bar for what it did.

Above, in each row, the training loop's phases; in the middle the engine's, with what the rank then
waited for the others' rollouts; below the drafter's training. Trees are green, those of n-grams
turquoise, the deeper the darker; plain decoding is blue.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastrl.callbacks.timeline_spans import (
    DRAFTER,
    ROLLOUT,
    UPDATE,
    WAITING,
    RankStep,
    idle_shares,
    joined,
    waits,
)
from fastrl.types import OFF, DraftStrategy, Span

_DOTS_PER_INCH = 100
_WIDTH_INCHES = 11.0
_MOST_RANKS = 64
"""More are left out, evenly: their rows would be a few pixels high."""
_COLOURS = {
    ROLLOUT: "#dddddd",
    UPDATE: "#d62728",
    DRAFTER: "#ff7f0e",
    WAITING: "#ffffff",
    "publish": "#8c564b",
    "publish_drafter": "#c49c94",
    "health": "#e377c2",
    "reward": "#9467bd",
    "prefill": "#7f7f7f",
    str(OFF): "#1f77b4",
}
_DEEPEST = 10
"""Draft depth from which on the green is darkest."""
_OTHER = "#bcbd22"
"""What some other callback did."""
_LANE_HEIGHT = 0.28
_FINEST = 2000
"""Bars of a name are joined where gaps are less than this part of the step: nobody would see."""


def picture(ranks: Sequence[RankStep], rl_step: int) -> npt.NDArray[np.uint8]:
    """The picture.

    Args:
        ranks: all ranks' step, rank 0 first.
        rl_step: RL steps finished.

    Returns:
        Pixels, RGB, [height, width, 3].
    """
    stride = -(-len(ranks) // _MOST_RANKS)
    shown = range(0, len(ranks), stride)
    figure = Figure(
        figsize=(_WIDTH_INCHES, 1.7 + 0.5 * len(shown)),
        dpi=_DOTS_PER_INCH,
        layout="constrained",
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    start_s = min(rank.start_s for rank in ranks)
    gap_s = (max(rank.end_s for rank in ranks) - start_s) / _FINEST
    waiting = waits(ranks)
    names: dict[str, None] = {}
    for row, number in enumerate(shown):
        rank = ranks[number]
        idle = [span for span in waiting[number] if span.seconds > gap_s]
        lanes = (rank.phases, (*rank.engine, *idle), rank.drafter)
        for lane, spans in enumerate(lanes):
            names |= dict.fromkeys(span.name for span in spans)
            _draw(axes, row + _LANE_HEIGHT * (lane - 1), joined(spans, gap_s), rank, start_s)
    axes.set_yticks(range(len(shown)), [f"rank {number}" for number in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("seconds")
    axes.set_title(_title(ranks, rl_step), fontsize=9)
    axes.legend(
        handles=[Patch(facecolor=_colour(name), edgecolor="grey", label=name) for name in names],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.35 / (0.5 + 0.5 * len(shown)) - 0.08),
        ncols=min(len(names), 9),
        fontsize=7,
    )
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def _draw(axes: Axes, place: float, spans: Sequence[Span], rank: RankStep, start_s: float) -> None:
    offset_s = rank.clock_offset_s - start_s
    axes.barh(
        [place] * len(spans),
        [span.seconds for span in spans],
        left=[offset_s + span.start_s for span in spans],
        height=_LANE_HEIGHT,
        color=[_colour(span.name) for span in spans],
        edgecolor=["grey" if span.name == WAITING else "none" for span in spans],
        linewidth=0.3,
    )


def _colour(name: str) -> str | tuple[float, float, float, float]:
    if (colour := _COLOURS.get(name)) is not None:
        return colour
    try:
        strategy = DraftStrategy.parse(name)
    except ValueError:
        return _OTHER
    share = min(strategy.depth, _DEEPEST) / _DEEPEST
    if strategy.drafter == "ngram":
        return mpl.colormaps["GnBu"](0.35 + 0.3 * share)
    return mpl.colormaps["Greens"](0.35 + 0.6 * share)


def _title(ranks: Sequence[RankStep], rl_step: int) -> str:
    title = f"RL step {rl_step}"
    if len(ranks) > 1:
        idle = idle_shares(ranks)
        title += (
            f": waiting for others' rollouts {idle.before:.0%} of the ranks' time, "
            f"{idle.after:.0%} without the drafter's training in it"
        )
    return title
