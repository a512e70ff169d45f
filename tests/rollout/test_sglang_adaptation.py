"""Real SGLang on the CPU with FastRL's plugin: strategies that change before every decode batch.

The kernels are stand-ins (tests/sglang_cpu); what switches, reads and counts is what runs on a GPU.
"""

import copy
import dataclasses
import itertools
import math
import time
from collections import Counter

import pytest
import torch
from policy_statistics import chi_square_p_value, joint_distribution

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.canary import canary_gap
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.sglang_rollouts import longest_sequence
from fastrl.types import FinishReason, SamplingParams, StepStats
from tests.rollout.test_sglang_engine import FILTERS, GREEDY, echoing_drafter
from tests.rollout.tiny_models import make_prompts, make_target

pytestmark = pytest.mark.sglang

LONG_GREEDY = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
POOL = ("3_1_4", "3_4_8", "5_2_12", "1_1_2")


@pytest.fixture(scope="module")
def switching(start_sglang, target_model):
    """SGLang prepared for the pool, with a drafter that is often right, and little room for what
    plain steps leave to it."""
    engine = start_sglang(selector=InTurns(("off", *POOL)), hidden_states=True, unread_gib=0)
    engine.load_policy(target_model.named_parameters(), version=0)
    engine.load_drafter(echoing_drafter(target_model).items(), version=0)
    return engine


def test_greedy_tokens_are_those_of_plain_decoding_while_switching_every_batch(switching, engine):
    prompts = make_prompts(6)
    switching.strategy_selector = InTurns(("off", *POOL))
    rollouts = switching.generate(prompts, GREEDY)
    expected = engine.generate(prompts, GREEDY)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in expected]
    stats = switching.stats()
    assert set(stats.steps_by_strategy) == {"off", *POOL}
    assert {span.name for span in stats.spans} == {"prefill", "off", *POOL}
    assert 0.5 < sum(span.seconds for span in stats.spans) / stats.seconds < 1.01
    assert abs(stats.spans[-1].end_s - time.perf_counter()) < 60  # a clock that both have
    assert stats.accepted_by_depth[0] > 20  # else nothing was put to the test


def test_steps_are_those_of_the_embedded_engine_whatever_went_before(
    switching, engine, target_model
):
    """The drafter has read all that plain steps left to it: each step of each strategy accepts as
    many tokens as where it reads along."""
    drafter = sensitive_drafter(target_model)
    switching.load_drafter(drafter.items(), version=1)
    engine.load_drafter(drafter.items(), version=1)
    # Chains: of trees the two engines sometimes keep another node among equally likely ones.
    trees = ("3_1_4", "3_1_4", "1_1_2")
    orders = [("off", *trees), (*("off",) * 3, *trees), (*("off",) * 45, *trees * 10)]
    accepted = 0
    for prompt, order in itertools.product(make_prompts(5), orders):
        switching.strategy_selector, engine.strategy_selector = InTurns(order), InTurns(order)
        (rollout,) = switching.generate([prompt], LONG_GREEDY)
        (expected,) = engine.generate([prompt], LONG_GREEDY)
        assert rollout.tokens == expected.tokens
        assert rollout.accept_lengths == expected.accept_lengths
        assert rollout.num_verify_steps == expected.num_verify_steps
        accepted += sum(rollout.accept_lengths) - len(rollout.accept_lengths)
    assert accepted > 20  # else nothing was put to the test


def sensitive_drafter(target_model) -> dict[str, torch.Tensor]:
    """Right now and then, by what its attention finds: at some 15% of places."""
    random = dict(EagleDrafter.for_target(target_model.config, seed=5).named_weights())
    echo = echoing_drafter(target_model)
    return {name: echo[name] + 0.5 * random[name] for name in echo}


def test_rows_that_join_and_leave_read_their_own(switching, engine, target_model):
    """More requests than rows: prefills come between, and rows stand at different places.

    What a chain accepts follows from the tokens before it alone, if the drafter has read them: so
    each step of each row emits one token, or as many as that chain accepts by itself.
    """
    drafter = sensitive_drafter(target_model)
    for one in (switching, engine):
        one.load_drafter(drafter.items(), version=1)
    prompts = make_prompts(12)
    engine.strategy_selector = FixedStrategy("3_1_4")
    expected = engine.generate(prompts, GREEDY)
    alone = [lengths_by_place(engine, rollout) for rollout in expected]
    assert sum(length > 1 for lengths in alone for length in lengths) > 40
    for order in (
        ("3_4_8", *("off",) * 5, "5_2_12", "off"),
        (*("off",) * 3, *("3_1_4",) * 7),
        (*("off",) * 35, *("3_1_4",) * 9),
    ):
        switching.strategy_selector = InTurns(order)
        for index, rollout in enumerate(switching.generate(prompts, GREEDY, num_samples=4)):
            assert rollout.tokens == expected[index // 4].tokens
            if "3_4_8" in order:
                continue
            place, num_chains = 1, 0
            for length in rollout.accept_lengths[:-1]:
                accepted = alone[index // 4][place]
                assert length in (1, accepted)
                num_chains += length == accepted
                place += length
            assert rollout.num_verify_steps <= num_chains + 1


def lengths_by_place(engine, rollout) -> list[int]:
    """What a chain right after so many tokens of the response emits; of none, 0."""
    shorter = [
        dataclasses.replace(
            rollout.prompt,
            prompt_id=place,
            tokens=(*rollout.prompt.tokens, *rollout.tokens[:place]),
        )
        for place in range(len(rollout.tokens) - 1)
    ]
    few = dataclasses.replace(GREEDY, max_tokens=6)
    return [0, *(one.accept_lengths[0] for one in engine.generate(shorter, few))]


@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_follow_the_target_distribution_while_switching(switching, target_model, filters):
    switching.load_drafter(echoing_drafter(target_model).items(), version=0)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, **filters)
    (prompt,) = make_prompts(1)
    expected = joint_distribution(target_model, prompt.tokens, sampling)
    counts = dict.fromkeys(expected, 0)
    for seed in range(5):
        switching.strategy_selector = InTurns(("3_4_8", "off", "5_2_12", "3_1_4")[seed % 4 :])
        for rollout in switching.generate([prompt], sampling, num_samples=160, seed=seed):
            counts[rollout.tokens] += 1
            logprob = math.log(expected[rollout.tokens])
            assert sum(rollout.logprobs) == pytest.approx(logprob, abs=1e-4)
    assert chi_square_p_value(counts, expected, 800) > 1e-4
    assert switching.stats().row_steps


def test_a_bandit_decides_in_sglang_and_comes_back_with_what_it_learned(switching, target_model):
    """Profiled before the first step, it ends where the drafter pays, and leaves a useless one."""
    bandit = ModelBased(["3_1_4", "3_4_8"], seed=1)
    bandit.journal = []
    switching.strategy_selector = bandit
    switching.load_drafter(echoing_drafter(target_model).items(), version=0)
    prompts = make_prompts(3)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    switching.generate(prompts, sampling)
    costs = [entry for entry in bandit.journal if not isinstance(entry, StepStats)]
    steps = [entry for entry in bandit.journal if isinstance(entry, StepStats)]
    assert {entry.query.strategy for entry in costs} == set(bandit.arms)
    assert {entry.query.batch_size for entry in costs} == {1, 4, 16, 64}
    assert all(0 < entry.seconds < 5 for entry in costs)
    stats = switching.stats()
    assert len(steps) == stats.num_steps == bandit.report().num_decisions
    assert sum(step.num_tokens for step in steps) >= 3 * 59
    for step in steps:
        if step.strategy.is_off:
            assert step.accept_lengths == (1,) * step.batch_size
            continue
        emitted = sum(sum(ranks) for ranks in step.accepted_by_rank) + step.batch_size
        assert emitted == step.num_tokens
        assert step.offered_by_rank[0][0] == step.batch_size
        assert all(
            few <= many
            for accepted, offered in zip(step.accepted_by_rank, step.offered_by_rank, strict=True)
            for few, many in zip(accepted, offered, strict=True)
        )
    journal = len(bandit.journal)
    switching.generate(prompts, sampling, seed=1)
    assert len(bandit.journal) > journal
    assert switching.stats().num_steps == len(bandit.journal) - journal  # nothing is timed twice


def test_steps_of_the_largest_batch_are_timed_where_its_prompts_are_read_in_parts(
    start_sglang, target_model
):
    """SGLang lets one of as many requests as it has rows wait, while another is read in parts."""
    bandit = ModelBased(["3_1_4", "3_4_8"], seed=1)
    bandit.journal = []
    engine = start_sglang(
        selector=bandit, max_batch_size=6, server_args={"chunked_prefill_size": 64}
    )
    engine.load_policy(target_model.named_parameters(), version=0)
    engine.generate(make_prompts(2), SamplingParams(max_tokens=30, ignore_eos=True))
    costs = [entry for entry in bandit.journal if not isinstance(entry, StepStats)]
    context_tokens = {entry.query.context_tokens for entry in costs}
    assert 6 * min(context_tokens) > 64  # else they are read in one
    timed = {(str(entry.query.strategy), entry.query.batch_size) for entry in costs}
    assert timed == set(itertools.product(("off", "3_1_4", "3_4_8"), (1, 4, 6)))
    engine.close()


def test_a_fixed_strategy_of_the_pool_may_take_over_and_no_other(switching):
    prompts = make_prompts(2)
    switching.strategy_selector = FixedStrategy("5_2_12")
    switching.generate(prompts, GREEDY)
    assert set(switching.stats().steps_by_strategy) == {"5_2_12"}
    switching.strategy_selector = FixedStrategy("8_4_16")
    with pytest.raises(ValueError, match=r"cannot run \['8_4_16'\]: close it"):
        switching.generate(prompts, GREEDY)


def test_a_wide_pool_keeps_to_its_rows_at_the_end_of_the_context(switching, target_model):
    """What it reserves for the pool's trees is noted in rows that end with the context."""
    switching.strategy_selector = InTurns(("off", *POOL))
    prompts = make_prompts(2, shortest=90)
    for _ in range(3):
        first, second = switching.generate(prompts, LONG_GREEDY)
        assert first.finish_reason == second.finish_reason == FinishReason.LENGTH
        longest = longest_sequence(128, switching.strategy_selector.strategies)
        assert len(first.prompt.tokens) + len(first.tokens) == longest
        time.sleep(1.5)  # idle, SGLang counts its cache
    assert all(
        len(rollout.tokens) == 8
        for rollout in switching.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    )


def test_a_rejected_fixed_strategy_is_plain_decoding(switching, target_model):
    switching.strategy_selector = FixedStrategy("3_4_8")
    switching.load_drafter(echoing_drafter(target_model).items(), version=7)
    switching.reject_drafter("stale, says the test")
    (rollout,) = switching.generate(make_prompts(1), GREEDY)
    assert switching.stats().steps_by_strategy == {"off": len(rollout.tokens) - 1}
    switching.load_drafter(echoing_drafter(target_model).items(), version=8)
    switching.generate(make_prompts(1), GREEDY)
    assert set(switching.stats().steps_by_strategy) == {"3_4_8"}


def test_hidden_states_are_those_of_a_plain_forward_while_switching(switching, target_model):
    switching.strategy_selector = InTurns(("off", *POOL))
    for rollout in switching.generate(
        make_prompts(3), SamplingParams(max_tokens=30), return_hidden_states=True
    ):
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens[:-1])])
        with torch.no_grad():
            expected = target_model.model(tokens).last_hidden_state[0]
        torch.testing.assert_close(rollout.hidden_states, expected, atol=3e-5, rtol=1e-4)


def test_canaries_go_through_all_strategies_and_teach_nothing(
    switching, target_model, tmp_path, monkeypatch
):
    switching.load_drafter(echoing_drafter(target_model).items(), version=0)
    bandit = ModelBased(["3_1_4", "3_4_8"])
    switching.strategy_selector = bandit
    learned, watched = copy.deepcopy(bandit.state_dict()), vars(switching._drafter_watch.health)
    watched = copy.deepcopy(watched)
    seen: Counter[str] = Counter()
    generate = switching.process.generate

    def counting(*arguments):
        responses = generate(*arguments)
        seen.update(responses.report.stats.steps_by_strategy)
        return responses

    monkeypatch.setattr(switching.process, "generate", counting)
    for _ in range(2):
        assert canary_gap(switching, target_model, 4) < 1e-4
    assert set(seen) == {"off", *POOL}
    assert canary_gap(switching, make_target(tmp_path, seed=1), 4) > 0.5
    assert switching.strategy_selector is bandit
    assert bandit.state_dict() == learned
    assert vars(switching._drafter_watch.health) == watched


def test_a_rejected_drafter_is_left_until_the_next_one(switching, target_model):
    """No restart: the bandit is told to leave its trees; a probe teaches it nothing."""
    weights = echoing_drafter(target_model)
    switching.load_drafter(weights.items(), version=2)
    bandit = ModelBased(["3_1_4", "3_4_8"])
    switching.strategy_selector = bandit
    process = switching.process
    with pytest.warns(UserWarning, match="told so"):
        switching.reject_drafter("told so")
    switching.generate(make_prompts(2), GREEDY)
    assert set(switching.stats().steps_by_strategy) == {"off"}
    switching.load_drafter(weights.items(), version=3)
    num_decisions = bandit.report().num_decisions
    switching.probe(make_prompts(2), SamplingParams(max_tokens=8, ignore_eos=True))
    assert bandit.report().num_decisions == num_decisions
    switching.generate(make_prompts(2), GREEDY)
    assert set(switching.stats().steps_by_strategy) - {"off"}
    assert switching.process is process
