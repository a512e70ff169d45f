"""The picture of a bandit: cells where they belong, colours by gain."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastrl.callbacks.strategy_heat_map import heat_map
from fastrl.rollout.bandit import BanditReport, BucketReport
from fastrl.types import OFF

THIRDS = {"off": 1 / 3, "4_1_5": 1 / 3, "4_2_8": 1 / 3}


def report(gains: list[dict[str, float]], shares: dict[str, float] = THIRDS) -> BanditReport:
    """One bucket for each, with the decisions shared like that between three strategies."""
    bucket = BucketReport(
        arm_shares=shares,
        best=OFF,
        tokens_per_second=1.0,
        gain=1.0,
        predicted_gain=None,
        arm_gains={},
        believed_gains={},
    )
    return BanditReport(
        num_decisions=3,
        explore_share=0.0,
        arm_shares=shares,
        gain=1.0,
        regret_share=0.0,
        regret_s=0.0,
        buckets={
            str(index): dataclasses.replace(bucket, arm_gains=arm_gains)
            for index, arm_gains in enumerate(gains)
        },
    )


def share_of(image_HWC: np.ndarray, channel: int) -> float:
    """Pixels that are clearly of a colour, left of the colour bar."""
    left = image_HWC[:, : int(0.8 * image_HWC.shape[1])].astype(int)
    others = [left[..., other] for other in range(3) if other != channel]
    return float(np.mean(left[..., channel] > np.maximum(*others) + 40))


RED, BLUE = 0, 2


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_faster_is_blue_and_slower_is_red(num_buckets: int) -> None:
    faster = heat_map(report([{"4_2_8": 3.0}] * num_buckets))
    slower = heat_map(report([{"4_2_8": 1 / 3}] * num_buckets))
    assert faster.dtype == np.uint8
    assert faster.shape[2] == 3
    assert share_of(faster, BLUE) > 0.1
    assert share_of(faster, RED) == 0
    assert share_of(slower, RED) > 0.1
    assert share_of(slower, BLUE) == 0


def test_batch_sizes_are_rows_and_strategies_columns() -> None:
    image_HWC = heat_map(report([{"off": 3.0}, {}, {"4_2_8": 3.0}])).astype(int)
    is_blue_HW = image_HWC[..., BLUE] > image_HWC[..., RED] + 40
    is_blue_HW[:, int(0.8 * is_blue_HW.shape[1]) :] = False  # the colour bar
    rows, columns = np.nonzero(is_blue_HW)
    height, width = rows.max() - rows.min(), columns.max() - columns.min()
    top = rows < rows.min() + height / 3
    bottom = rows > rows.max() - height / 3
    assert np.all(columns[top] < columns.min() + 0.4 * width)
    assert np.all(columns[bottom] > columns.max() - 0.4 * width)
    assert np.all(top | bottom)


def test_there_is_no_colour_where_nothing_is_known() -> None:
    image_HWC = heat_map(report([{}]))
    assert share_of(image_HWC, BLUE) == share_of(image_HWC, RED) == 0


def differing_columns(image_HWC: np.ndarray, other_HWC: np.ndarray) -> tuple[int, int]:
    """First and last column of pixels in which two pictures are not the same."""
    columns = np.nonzero(np.any(image_HWC != other_HWC, axis=(0, 2)))[0]
    return int(columns.min()), int(columns.max())


def test_decisions_are_shown_where_no_gain_is_known() -> None:
    """Of the strategies that were chosen, and of no others."""
    nothing = dict.fromkeys(THIRDS, 0.0)
    blank, off, last = (
        heat_map(report([{}], nothing | chosen)) for chosen in ({}, {"off": 1.0}, {"4_2_8": 1.0})
    )
    assert np.all(blank[np.any(blank != off, axis=2)] == 255)
    assert differing_columns(off, blank)[1] < differing_columns(last, blank)[0]


def test_a_gain_that_was_not_measured_is_in_brackets_though_its_strategy_was_run() -> None:
    """They widen the number, and nothing else changes."""
    measured = report([{"4_1_5": 1.0}])
    bucket = measured.buckets["0"]
    believed = dataclasses.replace(bucket, arm_gains={}, believed_gains={"4_1_5": 1.0})
    in_brackets = heat_map(dataclasses.replace(measured, buckets={"0": believed}))
    first, last = differing_columns(in_brackets, heat_map(measured))
    assert 0 < last - first < 0.15 * in_brackets.shape[1]


def test_a_measured_gain_is_shown_before_a_believed_one() -> None:
    def with_belief(measured: dict[str, float]) -> BanditReport:
        shown = report([measured])
        bucket = dataclasses.replace(shown.buckets["0"], believed_gains={"4_2_8": 1 / 3})
        return dataclasses.replace(shown, buckets={"0": bucket})

    assert share_of(heat_map(with_belief({"4_2_8": 3.0})), BLUE) > 0.1
    assert share_of(heat_map(with_belief({})), RED) > 0.1
