"""From hand-written answers of SGLang to rollouts and statistics: SGLang is not needed."""

import math

import numpy as np
import pytest

from fastrl.rollout.sglang_filters import sglang_filters
from fastrl.rollout.sglang_process import RawResponse
from fastrl.rollout.sglang_rollouts import (
    as_rollout,
    check_prompt,
    counted_statistics,
    longest_sequence,
    sglang_sampling,
    statistics,
)
from fastrl.rollout.sglang_steps import RequestSteps
from fastrl.types import OFF, DraftStrategy, EngineStats, FinishReason, Prompt, SamplingParams

PROMPT = Prompt(prompt_id=4, tokens=(5, 6), text="", answer="")


def raw(num_tokens: int = 3, **changes: object) -> RawResponse:
    settings: dict = {
        "tokens": tuple(range(num_tokens)),
        "logprobs": (-1.0,) * num_tokens,
        "finish_type": "length",
        "finish_detail": "",
        "num_cached_tokens": 0,
        "steps_by_num_accepted": (),
        "hidden_TD": None,
    }
    return RawResponse(**settings | changes)


def rollout_of(response: RawResponse, sampling: SamplingParams | None = None):
    return as_rollout(
        response,
        PROMPT,
        1,
        sampling=sampling or SamplingParams(),
        text="some text",
        policy_version=9,
    )


def test_a_rollout_carries_what_it_came_from():
    rollout = rollout_of(raw(finish_type="stop"))
    assert rollout.prompt is PROMPT
    assert (rollout.sample_index, rollout.policy_version, rollout.text) == (1, 9, "some text")
    assert rollout.finish_reason == FinishReason.STOP
    assert rollout.logprobs == (-1.0, -1.0, -1.0)


def test_plain_decoding_emits_a_token_a_step_after_the_prefills():
    rollout = rollout_of(raw(num_tokens=4))
    assert rollout.accept_lengths == (1, 1, 1)
    assert rollout.num_verify_steps == 0


def test_accept_lengths_sum_to_the_tokens_decoded():
    """2 steps of 1 token, 1 of 2, 1 of 4 make 8; the last of them went 2 past the end."""
    rollout = rollout_of(raw(num_tokens=7, steps_by_num_accepted=(2, 1, 0, 1)))
    assert rollout.num_verify_steps == 4
    assert rollout.accept_lengths == (1, 1, 2, 2)


def test_greedy_tokens_are_certain():
    assert rollout_of(raw(), SamplingParams(temperature=0)).logprobs == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "broken",
    [
        {"logprobs": (-1.0, math.nan, -1.0)},
        {"finish_type": "stop", "finish_detail": "NaN happened"},
    ],
)
def test_logits_that_are_not_numbers_are_an_error(broken):
    with pytest.raises(FloatingPointError, match="prompt 4, sample 1"):
        rollout_of(raw(**broken))


def test_a_request_given_up_is_an_error_with_its_reason():
    with pytest.raises(RuntimeError, match=r"gave the request up \(too long\)"):
        rollout_of(raw(finish_type="abort", finish_detail="too long"))


def test_missing_hidden_states_are_an_error():
    whole = rollout_of(raw(hidden_TD=np.zeros((4, 8), dtype=np.float32)))
    assert whole.hidden_states.shape == (4, 8)
    with pytest.raises(RuntimeError, match="3 tokens instead of 4"):
        rollout_of(raw(hidden_TD=np.zeros((3, 8), dtype=np.float32)))


def test_statistics_count_depths_from_the_histograms():
    """Of the 8 steps of all ranks' responses, 5 accepted at least one token, 3 at least two, 1
    three; 7 are of this rank's."""
    responses = [
        raw(num_tokens=5, steps_by_num_accepted=(1, 1, 1), num_cached_tokens=2),
        raw(num_tokens=8, steps_by_num_accepted=(2, 0, 1, 1)),
    ]
    strategy = DraftStrategy.parse("3_4_8")
    of_all_ranks = {0: 3, 1: 2, 2: 2, 3: 1}
    stats = statistics(responses, of_all_ranks, strategy, num_prompt_tokens=10, seconds=2.0)
    assert (stats.num_rollouts, stats.num_tokens, stats.num_prompt_tokens) == (2, 13, 8)
    assert (stats.num_steps, stats.steps_by_strategy) == (4, {"3_4_8": 4})
    assert (stats.row_steps, stats.accepted_tokens) == (7, 11)
    assert stats.offered_by_depth == (8, 5, 3)
    assert stats.accepted_by_depth == (5, 3, 1)
    assert stats.tokens_per_second == 6.5


def test_statistics_without_speculation_have_no_accept_length():
    stats = statistics([raw(), raw(num_tokens=6)], {}, OFF, num_prompt_tokens=4, seconds=1.0)
    assert (stats.num_steps, stats.row_steps, stats.accepted_tokens) == (5, 0, 0)
    assert stats.accept_length == 1
    assert stats.offered_by_depth == ()


def test_statistics_of_nothing_are_zero():
    stats = statistics([], {}, OFF, num_prompt_tokens=0, seconds=1.0)
    assert (stats.num_steps, dict(stats.steps_by_strategy)) == (0, {})


def test_counted_statistics_are_of_a_ranks_responses_but_for_steps_that_all_share():
    """Its first response: a plain step, and two that verified 3 and 1; its second: 2."""
    counted = EngineStats(
        num_steps=4,
        steps_by_strategy={"off": 1, "3_4_8": 3},
        row_steps=9,
        accepted_tokens=17,
        offered_by_depth=(9, 5, 3),
        accepted_by_depth=(5, 3, 0),
    )
    responses = [
        raw(num_tokens=6, steps=RequestSteps(accept_lengths=[1, 3, 1], num_verify_steps=2)),
        raw(num_tokens=3, steps=RequestSteps(accept_lengths=[2], num_verify_steps=1)),
    ]
    stats = counted_statistics(counted, responses, num_prompt_tokens=10, seconds=2.0)
    assert (stats.num_rollouts, stats.num_tokens, stats.num_prompt_tokens) == (2, 9, 10)
    assert (stats.row_steps, stats.accepted_tokens) == (3, 6)
    assert (stats.num_steps, stats.steps_by_strategy) == (4, {"off": 1, "3_4_8": 3})
    assert (stats.offered_by_depth, stats.accepted_by_depth) == ((9, 5, 3), (5, 3, 0))


def test_sampling_parameters_are_passed_on():
    sampling = SamplingParams(
        temperature=0.6,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        max_tokens=50,
        stop=("end",),
        stop_token_ids=(3,),
    )
    given = sglang_sampling(
        sampling, num_prompt_tokens=10, max_sequence=100, eos_token_ids=(1, 2), key=-5
    )
    assert given["temperature"] == 0.6
    assert (given["top_k"], given["top_p"], given["min_p"]) == (7, 0.9, 0.1)
    assert given["max_new_tokens"] == 50
    assert given["stop"] == ["end"]
    assert given["stop_token_ids"] == [1, 2, 3]
    assert given["sampling_seed"] == -5
    near_the_end = sglang_sampling(
        SamplingParams(), num_prompt_tokens=90, max_sequence=100, eos_token_ids=(), key=0
    )
    assert near_the_end["max_new_tokens"] == 10
    assert near_the_end["top_k"] == -1


def test_a_token_without_probability_is_an_error():
    """SGLang writes the lowest number of float32 for -inf."""
    impossible = raw(logprobs=(-1.0, -3.4028234663852886e38, -1.0))
    with pytest.raises(FloatingPointError, match="leave no probability"):
        rollout_of(impossible, SamplingParams(top_p=0.9))


def test_a_top_k_of_one_is_not_taken_for_greedy_decoding():
    """It keeps all best tokens that are equally likely, as min-p 1 does."""
    given = sglang_filters(SamplingParams(top_k=1, top_p=0.5, min_p=0.2, temperature=0.7))
    assert given == {"temperature": 0.7, "top_k": -1, "top_p": 1.0, "min_p": 1.0}
    assert sglang_filters(SamplingParams(top_k=1, temperature=0))["temperature"] == 0
    with pytest.raises(ValueError, match="for greedy decoding; set temperature 0"):
        sglang_filters(SamplingParams(temperature=1e-7))


@pytest.mark.parametrize(
    ("strategies", "longest"),
    [
        (["off"], 98),
        (["3_4_8"], 88),
        (["3_1_4"], 96),
        (["5_4_12"], 76),  # 40 are reserved a step, of which a row has 16 beyond the context
        (["off", "8_1_9", "2_2_3"], 81),  # as wide as the one and as deep as the other: 16
    ],
)
def test_a_draft_tree_takes_room_of_the_context(strategies, longest):
    pool = [DraftStrategy.parse(text) for text in strategies]
    assert longest_sequence(100, pool) == longest
    reserved = max(max(s.topk for s in pool) * max(s.depth for s in pool), pool[0].verify_tokens)
    row = 100 + 4 + max(one.verify_tokens for one in pool)
    assert longest + 2 * reserved <= row or pool == [OFF]


@pytest.mark.parametrize("num_tokens", [0, 100, 200])
def test_a_prompt_without_room_for_a_response_is_refused(num_tokens):
    prompt = Prompt(prompt_id=4, tokens=(5,) * num_tokens, text="", answer="")
    with pytest.raises(ValueError, match=f"prompt 4 has {num_tokens} tokens"):
        check_prompt(prompt, max_sequence=100, pool_tokens=1000, max_tokens=10)


def test_a_response_beyond_the_cache_is_refused():
    with pytest.raises(ValueError, match="may take 52 tokens, but SGLang's cache holds 53"):
        check_prompt(PROMPT, max_sequence=100, pool_tokens=53, max_tokens=50)
    check_prompt(PROMPT, max_sequence=100, pool_tokens=54, max_tokens=50)
    tree = [OFF, DraftStrategy.parse("5_2_11")]
    with pytest.raises(ValueError, match="52 tokens, and draft trees 22, but SGLang's cache"):
        check_prompt(PROMPT, max_sequence=100, pool_tokens=75, max_tokens=50, strategies=tree)
    check_prompt(PROMPT, max_sequence=100, pool_tokens=76, max_tokens=50, strategies=tree)
