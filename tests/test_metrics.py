"""docs/metrics.md describes every tag that a run writes to TensorBoard, and only such tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.recording_logger import RecordingLogger
from tests.test_quickstart import in_the_repository, run_quickstart
from tests.warmup_runs import make_data, make_module, make_trainer

__all__ = ["in_the_repository"]  # a fixture that applies to this file as well

METRICS = Path(__file__).parents[1] / "docs" / "metrics.md"
# Not in the run below: what `fastrl test` writes, a drafter's training on a budget and over several
# ranks, health checks, what ranks wait for one another.
OF_OTHER_RUNS = {
    "reward/test",
    "reward/test_pass@{k}",
    "drafter/max_time_share",
    "drafter/idle_steps",
    "drafter/idle_share_used",
    "time/idle_all_ranks",
    "time/idle_overrun",
    "health/canary_gap",
    "time/health",
    "idle/share_before",
    "idle/share_after",
    "timeline",
}
WARM_UP = "warmup/"
"""What a drafter's warm-up writes, all of it, and nothing else does."""


def described_tags(markdown: str) -> list[str]:
    """The first column of every table, families with their braces."""
    return re.findall(r"^\| `([^`]+)` \|", markdown, flags=re.MULTILINE)


def matches(described: str, tag: str) -> bool:
    literals = re.split(r"\{\w+\}", described)
    return re.fullmatch(r"[\w-]+".join(map(re.escape, literals)), tag) is not None


def undescribed(tags: Iterable[str], described: Iterable[str]) -> list[str]:
    described = list(described)
    return [tag for tag in tags if not any(matches(family, tag) for family in described)]


def test_a_family_matches_its_members_alone() -> None:
    described = ["reward/mean", "bandit/arm_share_{strategy}", "reward/pass@{k}"]
    assert undescribed(["reward/mean", "bandit/arm_share_4_1_5", "reward/pass@16"], described) == []
    others = ["reward/mean_", "bandit/arm_share_", "bandit/arm", "pass@1", "reward/pass@1/x"]
    assert undescribed(others, described) == others


def test_every_tag_of_a_run_is_described_and_every_description_is_of_a_tag(tmp_path: Path) -> None:
    run_quickstart(tmp_path, "--data.init_args.val_num_samples=2", "--model.init_args.kl_coef=0.01")
    (run,) = tmp_path.glob("lightning_logs/version_*")
    events = EventAccumulator(str(run))
    events.Reload()
    kinds = events.Tags()
    tags = [*kinds["scalars"], *kinds["histograms"], *kinds["tensors"], *kinds["images"]]
    assert {"rollout/response_lengths", "rollout/samples/text_summary", "reward/pass@2"} <= set(
        tags
    )
    described = described_tags(METRICS.read_text(encoding="utf-8"))
    assert undescribed(tags, described) == []
    unseen = {family for family in described if not any(matches(family, tag) for tag in tags)}
    of_chosen_ngrams = {"drafter/ngram_acceptance_rate", "drafter/ngram_accept_depth_{depth}"}
    others = {family for family in unseen if not family.startswith(WARM_UP)}
    assert others - of_chosen_ngrams == OF_OTHER_RUNS  # the bandit may do without in a short run


def test_every_tag_of_a_warm_up_is_described_and_every_description_is_of_a_tag(
    tmp_path: Path,
) -> None:
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger, val_check_interval=2)
    trainer.fit(make_module(tmp_path), datamodule=make_data(tmp_path))
    tags = {tag for _, metrics in logger.logged for tag in metrics} - {"epoch"}
    described = described_tags(METRICS.read_text(encoding="utf-8"))
    families = [family for family in described if family.startswith(WARM_UP)]
    assert undescribed(tags, families) == []
    assert all(any(matches(family, tag) for tag in tags) for family in families)


def test_where_a_tag_is_computed_exists() -> None:
    paths = re.findall(r"\| `([\w/]+\.py)` \|$", METRICS.read_text("utf-8"), flags=re.MULTILINE)
    assert len(paths) == len(described_tags(METRICS.read_text("utf-8")))
    missing = [path for path in paths if not (METRICS.parents[1] / "fastrl" / path).is_file()]
    assert missing == []
