"""A learned drafter gone bad is named, and n-grams or plain decoding serve until the next one."""

import warnings

import pytest
import torch

from fastrl.rollout.bandit import EpsilonGreedy, FixedStrategy, InTurns
from fastrl.rollout.drafter_health import DrafterHealth
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.tiny_models import VOCAB_SIZE, make_drafter, make_prompts, make_target
from tests.rollout.torch_engine.fakes import ScriptedDrafting

SAMPLING = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture
def drafter(target_model, tmp_path):
    return make_drafter(tmp_path / "published", target_model, seed=4)


def generate(engine, **options):
    return engine.generate(make_prompts(3), SAMPLING, num_samples=2, **options)


def strategies_of(engine):
    return set(engine.stats().steps_by_strategy)


def spoil(drafter):
    with torch.no_grad():
        drafter.fc.weight[0, 0] = torch.nan


def test_a_published_drafter_of_no_numbers_is_named_and_n_grams_serve_until_the_next(
    engine, drafter
):
    engine.strategy_selector = FixedStrategy("3_3_10")
    expected = [rollout.tokens for rollout in generate(engine)]
    weights = {name: tensor.clone() for name, tensor in drafter.named_weights()}
    spoil(drafter)
    with pytest.warns(UserWarning, match=r"version 3: its weights are not finite: \['fc\.weight'"):
        engine.load_drafter(drafter.named_weights(), version=3)
    assert [rollout.tokens for rollout in generate(engine)] == expected
    assert strategies_of(engine) == {"ngram_3_3_10"}
    assert [failure.split(":")[0] for failure in engine.stats().drafter_failures] == [
        "drafter version 3"
    ]
    generate(engine)
    assert strategies_of(engine) == {"ngram_3_3_10"}
    assert engine.stats().drafter_failures == ()  # told once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.load_drafter(weights.items(), version=4)
        assert [rollout.tokens for rollout in generate(engine)] == expected
    assert strategies_of(engine) == {"3_3_10"}


def test_two_bad_publications_are_two_failures(engine, drafter):
    spoil(drafter)
    for version in (1, 2):
        with pytest.warns(UserWarning, match=f"version {version}"):
            engine.load_drafter(drafter.named_weights(), version=version)
    generate(engine)
    assert len(engine.stats().drafter_failures) == 2


@pytest.mark.parametrize("strategy", ["3_3_10", "4_1_5"])
def test_drafts_that_turn_into_no_numbers_are_noticed_by_the_end_of_the_call(engine, strategy):
    engine.strategy_selector = FixedStrategy(strategy)
    generate(engine)
    spoil(engine._started().drafter)
    engine._started().drafting.refresh()
    with pytest.warns(UserWarning, match="its drafts are not numbers"):
        generate(engine)
    assert len(engine.stats().drafter_failures) == 1
    generate(engine)
    assert strategies_of(engine) == {f"ngram_{strategy}"}


def test_a_bad_draft_is_not_held_against_the_next_drafter(engine, drafter):
    spoil(engine._started().drafter)
    engine._started().drafting.refresh()
    engine.strategy_selector = FixedStrategy("3_3_10")
    with pytest.warns(UserWarning, match="not numbers"):
        generate(engine)
    engine.load_drafter(drafter.named_weights(), version=1)
    engine.strategy_selector = FixedStrategy("off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(engine)


def test_what_a_drafter_of_no_numbers_left_in_the_cache_is_not_held_against_the_next(
    engine, drafter
):
    """It reads prompts while it is left out, and longer ones than those of the next call."""
    weights = {name: tensor.clone() for name, tensor in drafter.named_weights()}
    spoil(drafter)
    with pytest.warns(UserWarning, match="not finite"):
        engine.load_drafter(drafter.named_weights(), version=1)
    engine.strategy_selector = order = InTurns(["off", "off", "off", "3_3_10"])
    engine.generate(make_prompts(3, shortest=60), SAMPLING, num_samples=2)
    engine.load_drafter(weights.items(), version=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(engine)
    assert strategies_of(engine) == set(map(str, order.strategies))
    assert engine.stats().accepted_by_depth[0] > 0


def test_a_drafter_that_nothing_is_accepted_of_gives_way_within_its_window(engine):
    engine.strategy_selector = FixedStrategy("off")
    known = generate(engine)
    engine._health = DrafterHealth(window_rows=60)
    right, wrong = (
        ScriptedDrafting(known, is_right=is_right, vocab_size=VOCAB_SIZE)
        for is_right in (True, False)
    )
    engine.strategy_selector = FixedStrategy("2_1_3")
    engine._started().drafting = right
    generate(engine)
    assert strategies_of(engine) == {"2_1_3"}
    engine._started().drafting = wrong
    with pytest.warns(UserWarning, match="0 of the last 60 rows accepted its first draft token"):
        rollouts = generate(engine)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in known]
    by_strategy = engine.stats().steps_by_strategy
    assert by_strategy["2_1_3"] == 10  # of 6 rows each
    assert by_strategy["ngram_2_1_3"] > 0


def test_random_weights_swapped_in_fall_below_the_floor(engine, target_model, tmp_path):
    engine._health = DrafterHealth(min_acceptance=0.5, window_rows=60)  # what a good one reaches
    other = make_drafter(tmp_path, target_model, seed=11)
    engine.load_drafter(other.named_weights(), version=9)
    engine.strategy_selector = FixedStrategy("2_1_3")
    with pytest.warns(UserWarning, match=r"drafter version 9: \d+ of the last 6\d rows"):
        generate(engine)
    assert strategies_of(engine) == {"2_1_3", "ngram_2_1_3"}


class Impartial(EpsilonGreedy):
    """All arms are as good to it, however long their steps took: its seed alone decides."""

    def _rates(self, bucket, arms):
        return [1.0] * len(arms)


@pytest.mark.parametrize("fallback", [["ngram_4_1_5"], []], ids=["with n-grams", "without"])
def test_a_bandit_is_left_with_its_other_arms(engine, drafter, fallback):
    engine.strategy_selector = Impartial(["3_3_10", "2_1_3", *fallback], epsilon=0.5)
    weights = {name: tensor.clone() for name, tensor in drafter.named_weights()}
    spoil(drafter)
    with pytest.warns(UserWarning, match="version 1"):
        engine.load_drafter(drafter.named_weights(), version=1)
    generate(engine)
    assert strategies_of(engine) == {"off", *fallback}
    engine.load_drafter(weights.items(), version=2)
    generate(engine)
    # Which of the others it goes on with is a matter of time.
    assert {"3_3_10", "2_1_3"} <= strategies_of(engine) <= {"off", "3_3_10", "2_1_3", *fallback}


def test_a_selector_set_after_the_failure_is_told_of_it(engine, drafter):
    spoil(drafter)
    with pytest.warns(UserWarning, match="version 1"):
        engine.load_drafter(drafter.named_weights(), version=1)
    engine.strategy_selector = FixedStrategy("3_3_10")
    generate(engine)
    assert strategies_of(engine) == {"ngram_3_3_10"}


def test_the_checkpoint_s_drafter_is_judged_when_the_engine_starts(tmp_path):
    model = make_target(tmp_path / "target")
    drafter = make_drafter(tmp_path / "drafter", model)
    spoil(drafter)
    drafter.save_pretrained(tmp_path / "drafter")
    engine = TorchEngine(str(tmp_path / "drafter"), "3_3_10", device="cpu")
    with pytest.warns(UserWarning, match=r"drafter of .*: its weights are not finite"):
        engine.start(str(tmp_path / "target"))
    engine.load_policy(model.named_parameters(), version=0)
    generate(engine)
    assert strategies_of(engine) == {"ngram_3_3_10"}
    assert len(engine.stats().drafter_failures) == 1
