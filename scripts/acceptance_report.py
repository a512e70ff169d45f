"""Shows what eval_drafter.py found: tables, JSON, a plot. Leaves out counting
(acceptance_figures.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acceptance_figures import KS, AcceptanceFigure, LengthFigure, Part, TopkFigure
from rollout_figures import OFF, draw_ratios
from sd_figures import EngineFigure, print_figures

_ALL = Part()
_SHOWN_DEPTHS = 3
"""Of tasks and places; the JSON has all."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All figures of a drafter."""

    subject: dict[str, Any]
    """What was evaluated, and how: plain values."""
    lengths: list[LengthFigure] = field(default_factory=list)
    depths: list[AcceptanceFigure] = field(default_factory=list)
    ranks: list[AcceptanceFigure] = field(default_factory=list)
    """Empty from an engine that does not tell ranks."""
    topk: list[TopkFigure] = field(default_factory=list)
    speed: list[EngineFigure] = field(default_factory=list)
    """Empty where it was not measured."""
    failures: list[str] = field(default_factory=list)
    """Why an engine would have left the drafter out."""


# -- tables ---------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    """All tables but that of the speed."""
    strategies = list(dict.fromkeys(figure.strategy for figure in report.lengths))
    print("\naccept length: tokens a decode step, by task and by place in the response")
    _print_table(
        strategies,
        {
            part.name: [_length(report, strategy, part) for strategy in strategies]
            for part in dict.fromkeys(figure.part for figure in report.lengths)
        },
    )
    print("\nshare of steps that accept a draft at a depth, of the (n) that accepted all before")
    _print_table(strategies, _depth_rows(of_all(report.depths), strategies))
    for strategy in strategies:
        _print_parts([figure for figure in report.depths if figure.strategy == strategy])
    for strategy in strategies:
        _print_ranks([figure for figure in of_all(report.ranks) if figure.strategy == strategy])
    print("\nshare of response tokens among the drafter's k most likely, by depth")
    _print_table([f"k = {k}" for k in KS], _topk_rows(report.topk))


def print_speed(figures: Sequence[EngineFigure]) -> None:
    """Each arm against plain decoding, on this machine."""
    print(f"\ntokens a second, and in ratio to {OFF}")
    print_figures(figures)


def _print_table(columns: Sequence[str], rows: dict[str, Sequence[str]]) -> None:
    width = max((len(name) for name in rows), default=0)
    print(" " * width + "".join(f"{column:>14}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:>{width}}" + "".join(f"{cell:>14}" for cell in cells))


def _length(report: Report, strategy: str, part: Part) -> str:
    found = (f for f in report.lengths if (f.strategy, f.part) == (strategy, part))
    return next((f"{figure.accept_length:.2f}" for figure in found), "-")


def _depth_rows(
    figures: Sequence[AcceptanceFigure], strategies: Sequence[str]
) -> dict[str, Sequence[str]]:
    rates = {
        (figure.strategy, figure.depth): f"{figure.rate:.3f} ({figure.num_offered})"
        for figure in figures
    }
    depths = sorted({figure.depth for figure in figures})
    return {
        f"depth {depth}": [rates.get((strategy, depth), "-") for strategy in strategies]
        for depth in depths
    }


def of_all(figures: Sequence[AcceptanceFigure]) -> list[AcceptanceFigure]:
    """Those that are of no task or place of their own."""
    return [figure for figure in figures if figure.part == _ALL]


def _print_parts(figures: Sequence[AcceptanceFigure]) -> None:
    """Of one strategy, the first depths by task and by place."""
    if not figures:
        return
    rates = {(f.part, f.depth): f"{f.rate:.3f} ({f.num_offered})" for f in figures}
    depths = range(1, min(max(figure.depth for figure in figures), _SHOWN_DEPTHS) + 1)
    print(f"\n{figures[0].strategy}: the same by task and by place in the response")
    _print_table(
        [f"depth {depth}" for depth in depths],
        {
            part.name: [rates.get((part, depth), "-") for depth in depths]
            for part in dict.fromkeys(figure.part for figure in figures)
            if part != _ALL
        },
    )


def _print_ranks(figures: Sequence[AcceptanceFigure]) -> None:
    """Of one strategy; a chain has but one rank, which the table by depth has."""
    ranks = sorted({figure.rank for figure in figures if figure.rank is not None})
    if len(ranks) < 2:
        return
    rates = {(figure.depth, figure.rank): f"{figure.rate:.3f}" for figure in figures}
    print(f"\n{figures[0].strategy}: share of children accepted, of those offered, by rank")
    _print_table(
        [f"rank {rank}" for rank in ranks],
        {
            f"depth {depth}": [rates.get((depth, rank), "-") for rank in ranks]
            for depth in sorted({figure.depth for figure in figures})
        },
    )


def _topk_rows(figures: Sequence[TopkFigure]) -> dict[str, Sequence[str]]:
    """Every depth of all drafts; of tasks and places the first."""
    rows: dict[str, list[str]] = {}
    for figure in figures:
        if figure.part == _ALL or figure.depth == 1:
            name = f"{figure.part.name}, depth {figure.depth}"
            rows.setdefault(name, []).append(f"{figure.accuracy:.3f}")
    return dict(rows)


# -- files ----------------------------------------------------------------------------------------


def write_json(report: Report, path: Path) -> None:
    """Counts and what follows from them."""
    written = asdict(report)
    for name, rate in (
        *(("lengths", "accept_length"), ("depths", "rate")),
        *(("ranks", "rate"), ("topk", "accuracy")),
    ):
        for plain, figure in zip(written[name], getattr(report, name), strict=True):
            plain[rate] = getattr(figure, rate)
            if "part" in plain:
                plain.update(plain.pop("part"))
    path.write_text(json.dumps(written, indent=1) + "\n")


def draw(report: Report, path: Path) -> None:
    """Six panels: acceptance by depth and by rank, accept length by place and by task, top-k
    accuracy, speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(nrows=2, ncols=3, figsize=(17, 9))
    (depths, ranks, places), (topk, tasks, speed) = panels
    strategies = list(dict.fromkeys(figure.strategy for figure in report.lengths))
    _draw_depths(depths, of_all(report.depths), strategies)
    _draw_ranks(ranks, of_all(report.ranks))
    _draw_places(places, report.lengths, strategies)
    _draw_topk(topk, report.topk)
    _draw_tasks(tasks, report.lengths, strategies)
    if report.speed:
        draw_ratios(speed, report.speed)
    else:
        speed.set_axis_off()
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


def _draw_depths(axes: Any, figures: Sequence[AcceptanceFigure], strategies: Sequence[str]) -> None:
    for strategy in strategies:
        own = [figure for figure in figures if figure.strategy == strategy]
        axes.plot([f.depth for f in own], [f.rate for f in own], marker="o", label=strategy)
    axes.set_xticks(sorted({figure.depth for figure in figures}))
    axes.set(xlabel="depth", ylabel="accepted, of steps that got there", ylim=(0, 1))
    _finish(axes)


def _draw_ranks(axes: Any, figures: Sequence[AcceptanceFigure]) -> None:
    """Of the strategy with most ranks."""
    if not figures:
        axes.set_axis_off()
        return
    strategy = max(figures, key=lambda figure: figure.rank or 0).strategy
    own = [figure for figure in figures if figure.strategy == strategy]
    for depth in sorted({figure.depth for figure in own}):
        at_depth = [figure for figure in own if figure.depth == depth]
        axes.plot(
            [f.rank for f in at_depth],
            [f.rate for f in at_depth],
            marker="o",
            label=f"depth {depth}",
        )
    axes.set_xticks(sorted({figure.rank for figure in own if figure.rank}))
    axes.set(xlabel=f"rank ({strategy})", ylabel="accepted, of children offered", ylim=(0, 1))
    _finish(axes)


def _draw_places(axes: Any, figures: Sequence[LengthFigure], strategies: Sequence[str]) -> None:
    for strategy in strategies:
        own = [f for f in figures if f.strategy == strategy and f.part.places is not None]
        axes.plot(
            [figure.part.places[0] for figure in own if figure.part.places],
            [figure.accept_length for figure in own],
            marker="o",
            label=strategy,
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="place in the response, from", ylabel="accept length")
    _finish(axes)


def _draw_topk(axes: Any, figures: Sequence[TopkFigure]) -> None:
    for k in KS:
        own = [figure for figure in figures if figure.k == k and figure.part == _ALL]
        axes.plot([f.depth for f in own], [f.accuracy for f in own], marker="o", label=f"k = {k}")
    axes.set(xlabel="depth", ylabel="response tokens among the k most likely", ylim=(0, 1))
    _finish(axes)


def _draw_tasks(axes: Any, figures: Sequence[LengthFigure], strategies: Sequence[str]) -> None:
    parts = [part for part in dict.fromkeys(f.part for f in figures) if part.places is None]
    lengths = {(f.strategy, f.part): f.accept_length for f in figures}
    for number, strategy in enumerate(strategies):
        axes.bar(
            [place + number / (len(strategies) + 1) for place in range(len(parts))],
            [lengths[strategy, part] for part in parts],
            width=1 / (len(strategies) + 1),
            align="edge",
            label=strategy,
        )
    axes.set_xticks(
        [place + 0.4 for place in range(len(parts))], [part.name for part in parts], rotation=20
    )
    axes.set(ylabel="accept length")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
