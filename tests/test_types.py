"""Records validate themselves."""

import pytest

from fastrl.types import OFF, DraftStrategy


def test_strategies_are_written_as_depth_topk_verify_tokens():
    strategy = DraftStrategy.parse("8_4_48")
    assert (strategy.depth, strategy.topk, strategy.verify_tokens) == (8, 4, 48)
    assert str(strategy) == "8_4_48"
    assert DraftStrategy.parse("off") is OFF
    assert str(OFF) == "off"
    assert OFF.is_off
    assert not strategy.is_off
    assert strategy.drafter == "learned"


def test_ngram_strategies_are_trees_of_another_drafter():
    strategy = DraftStrategy.parse("ngram_8_1_9")
    assert (strategy.depth, strategy.topk, strategy.verify_tokens) == (8, 1, 9)
    assert strategy.drafter == "ngram"
    assert str(strategy) == "ngram_8_1_9"
    assert strategy != DraftStrategy.parse("8_1_9")


@pytest.mark.parametrize(
    ("text", "expected"), [("8_1_9", True), ("ngram_8_1_9", False), ("off", False)]
)
def test_only_learned_trees_need_a_learned_drafter(text, expected):
    assert DraftStrategy.parse(text).needs_learned_drafter is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8_4", "malformed strategy '8_4': write depth_topk_verifytokens"),
        ("8-4-48", "malformed strategy"),
        ("on", "malformed strategy"),
        ("0_1_1", "plain decoding is written 'off'"),
        ("8_4_8", "verify_tokens must be > depth.*use at least 8_4_9"),
        ("8_0_9", "depth and topk must be >= 1"),
        ("2_2_9", "has at most 7 nodes"),
        ("3_1_5", "has at most 4 nodes"),
    ],
)
def test_malformed_strategies_are_refused_with_the_fix(text, message):
    with pytest.raises(ValueError, match=message):
        DraftStrategy.parse(text)


def test_the_largest_tree_counts_root_first_level_and_expansions():
    # Root, 3 children, then 2 levels of 3 nodes expanded into 3 children each.
    assert DraftStrategy(3, 3, 4).max_nodes == 1 + 3 + 2 * 9
