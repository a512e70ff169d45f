"""Profiled step times between and beyond their points, against the law that made the points."""

import pytest

from fastrl.rollout.cost_profile import CostProfile


def law(batch_size: int, context_tokens: int) -> float:
    """A part for the weights, one for each row, and one for each token of context that is read."""
    return 1.0 + 0.1 * batch_size + 1e-3 * batch_size * context_tokens


def profile_of(points: list[tuple[int, int]]) -> CostProfile:
    profile = CostProfile()
    for batch_size, context_tokens in points:
        profile.add(batch_size, context_tokens, law(batch_size, context_tokens))
    return profile


def test_between_points_and_beyond_the_last_batch_seconds_are_linear():
    profile = profile_of([(1, 128), (4, 128), (16, 128)])
    for batch_size in (1, 2, 4, 10, 16, 40):
        assert profile.seconds(batch_size, 128) == pytest.approx(law(batch_size, 128))
        assert profile.seconds(batch_size, 5000) == profile.seconds(batch_size, 128)
        assert profile.seconds(batch_size, 5) == profile.seconds(batch_size, 128)


def test_growth_with_the_context_is_linear_at_profiled_batches_and_level_beyond():
    profile = profile_of([(1, 128), (4, 128), (16, 128), (64, 128), (1, 1024), (16, 1024)])
    for context_tokens in (128, 500, 1024, 3000):
        for batch_size in (1, 16):
            expected = law(batch_size, context_tokens)
            assert profile.seconds(batch_size, context_tokens) == pytest.approx(expected)
    assert law(1, 1024) / law(1, 128) < profile.seconds(8, 1024) / profile.seconds(8, 128)
    grown = profile.seconds(64, 1024) / profile.seconds(64, 128)
    assert grown == pytest.approx(law(16, 1024) / law(16, 128))


def test_a_longer_context_is_never_held_to_be_faster():
    profile = profile_of([(1, 128)])
    profile.add(1, 1024, 0.5 * law(1, 128))  # noise
    assert profile.seconds(1, 700) == law(1, 128)


def test_a_step_beyond_the_points_becomes_one_as_of_the_shortest_context():
    profile = profile_of([(1, 128), (1, 1024)])
    assert profile.tells(1)
    assert not profile.tells(2)
    profile.extend(8, 1024, 7.0)
    assert profile.tells(16)
    assert not profile.tells(17)
    assert profile.seconds(8, 1024) == pytest.approx(7.0)
    assert profile.seconds(8, 128) == pytest.approx(7.0 * law(1, 128) / law(1, 1024))
    empty = CostProfile()
    empty.extend(8, 300, 7.0)
    assert empty.seconds(8, 900) == 7.0


def test_contexts_that_differ_little_tell_nothing_of_growth():
    profile = profile_of([(1, 100), (4, 100)])
    profile.add(1, 110, 2 * law(1, 100))  # noise
    assert profile.seconds(1, 1000) == law(1, 100)


def test_each_batch_size_grows_by_its_own_longest_context():
    profile = profile_of([(1, 128), (16, 128), (1, 1024), (16, 1024), (1, 4096)])
    assert profile.seconds(1, 4096) == pytest.approx(law(1, 4096))
    assert profile.seconds(16, 4096) == pytest.approx(law(16, 4096))


def test_it_covers_its_largest_batch_and_twice_its_longest_context():
    profile = profile_of([(1, 128), (4, 128), (1, 1000)])
    assert profile.covers_batch(4)
    assert profile.covers_context(2000)
    assert not profile.covers_batch(5)
    assert not profile.covers_context(2001)
    assert not CostProfile().covers_batch(1)
    assert not CostProfile().covers_context(1)


def test_a_restored_profile_tells_the_same():
    profile = profile_of([(4, 128), (1, 128), (1, 1000)])
    restored = CostProfile()
    restored.load_state_dict(profile.state_dict())
    assert restored.state_dict() == profile.state_dict()
    assert restored.seconds(3, 600) == profile.seconds(3, 600)
