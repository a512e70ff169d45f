"""What SGLang is started with, and what it is not started for: SGLang is not needed."""

import pytest
import torch

from fastrl.rollout.bandit import EpsilonGreedy, FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sglang_arguments import (
    checked_strategies,
    graph_arguments,
    place_arguments,
    speculation_arguments,
    strategy_pool,
)
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.types import OFF, DraftStrategy, SamplingParams
from tests.rollout.tiny_models import make_eagle3_drafter, make_prompts


def test_a_strategy_becomes_sglangs_arguments():
    assert speculation_arguments((DraftStrategy.parse("8_4_48"),), None, "drafter") == {
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": "drafter",
        "speculative_num_steps": 8,
        "speculative_eagle_topk": 4,
        "speculative_num_draft_tokens": 48,
    }
    assert speculation_arguments((OFF,), None, "drafter") == {}


def test_a_bandits_strategies_become_a_pool_as_deep_wide_and_large_as_any():
    bandit = EpsilonGreedy(strategies=["8_1_9", "4_2_8", "2_4_21"])
    pool = strategy_pool(bandit, max_batch_size=128)
    assert pool is not None
    limits = {str(strategy): limit for strategy, limit in pool.largest_batch.items()}
    assert limits == {"8_1_9": None, "4_2_8": None, "2_4_21": 2048 // 21}
    assert speculation_arguments(tuple(bandit.arms), pool, "drafter") == {
        "speculative_algorithm": "FASTRL",
        "speculative_draft_model_path": "drafter",
        "speculative_num_steps": 8,
        "speculative_eagle_topk": 4,
        "speculative_num_draft_tokens": 21,
    }
    assert strategy_pool(FixedStrategy("8_1_9"), max_batch_size=128) is None
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert graph_arguments(pool, cuda, 128) == {"cuda_graph_max_bs_decode": 128}
    assert graph_arguments(None, cuda, 128) == graph_arguments(pool, cpu, 128) == {}


def test_n_gram_strategies_are_refused():
    with pytest.raises(ValueError, match="n-gram"):
        checked_strategies(FixedStrategy("ngram_4_1_5"), "drafter")


def test_a_strategy_without_its_drafter_is_refused():
    with pytest.raises(ValueError, match="drafter_path is null"):
        checked_strategies(FixedStrategy("4_2_8"), None)
    assert checked_strategies(FixedStrategy("off"), None) == (OFF,)


def test_a_bandit_over_n_grams_is_refused_at_the_start(folders):
    engine = SGLangEngine(drafter_path=str(folders[1]))
    engine.strategy_selector = EpsilonGreedy(strategies=["4_2_8", "ngram_4_1_5"])
    with pytest.raises(ValueError, match="ngram_4_1_5: SGLang does not draft n-gram trees"):
        engine.start(str(folders[0]))


def test_engines_side_by_side_take_other_ports():
    places = [place_arguments(torch.device("cpu")) for _ in range(2)]
    ports = {place[key] for place in places for key in ("port", "nccl_port")}
    assert len(ports) == 4
    assert "base_gpu_id" not in places[0]
    assert place_arguments(torch.device("cuda:3"))["base_gpu_id"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_size": 0}, "tp_size must be >= 1, got 0"),
        ({"max_batch_size": 0}, "max_batch_size must be >= 1"),
        ({"bucket_mib": 0}, "bucket_mib must be >= 1"),
        ({"start_timeout_s": 0}, "start_timeout_s must be > 0"),
        ({"mem_fraction_static": 1.5}, "mem_fraction_static must be in"),
        ({"strategy": "4-2-8"}, "malformed strategy"),
        ({"server_args": {"tp_size": 2}}, r"server_args must not hold \['tp_size'\]"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SGLangEngine(**options)


@pytest.mark.parametrize("strategy", ["off", "4_2_8"])
@pytest.mark.parametrize("name", ["speculative_num_steps", "speculative_algorithm"])
def test_server_arguments_that_the_strategy_sets_are_refused(strategy, name):
    with pytest.raises(ValueError, match=rf"must not hold \['{name}'\]"):
        SGLangEngine(drafter_path="drafter", strategy=strategy, server_args={name: 3})


def test_an_eagle3_drafter_is_told_from_other_strangers(folders, target_model, tmp_path):
    make_eagle3_drafter(tmp_path / "eagle3", target_model)
    for folder, message, of_engine in (
        # An engine goes by the checkpoint; this one leaves open what it reads of a shallow target.
        (tmp_path / "eagle3", "is an EAGLE-3 drafter", "which layers of the target it reads"),
        (folders[0], "is it a", "is it a"),
    ):
        with pytest.raises(ValueError, match=message):
            EagleDrafter.from_pretrained(folder, target_model.config)
        engine = SGLangEngine(drafter_path=str(folder), strategy="4_2_8", device="cpu")
        with pytest.raises(ValueError, match=of_engine):
            engine.start(str(folders[0]))
        assert engine.process is None


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        SGLangEngine().start(str(tmp_path))


def test_before_its_start_it_generates_nothing():
    with pytest.raises(ValueError, match="not started"):
        SGLangEngine().generate(make_prompts(1), SamplingParams())
