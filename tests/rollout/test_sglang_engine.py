"""Real SGLang on the CPU, against transformers and the embedded engine.

The kernels are stand-ins (tests/sglang_cpu): what is tested is our adapter, and that SGLang does
what the adapter takes for granted.
"""

import copy
import dataclasses
import math
import os
import signal
import threading
import time

import pytest
import torch
from policy_statistics import chi_square_p_value, joint_distribution

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sglang_process import EngineError, living_members
from fastrl.rollout.sglang_rollouts import longest_sequence
from fastrl.types import FinishReason, SamplingParams
from tests.rollout.tiny_models import make_prompts, make_target

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, temperature=1, ignore_eos=True)
FILTERS = (
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.25},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.3, "temperature": 1.3},
)
STRATEGIES = ("off", "3_1_4", "3_4_8", "5_2_12")


@pytest.fixture(params=STRATEGIES)
def any_strategy(request, sglang_by_strategy, target_model):
    """SGLang with each strategy, weights of version 0, and a drafter that is often right."""
    engine = sglang_by_strategy(request.param)
    engine.load_policy(target_model.named_parameters(), version=0)
    if request.param != "off":
        engine.load_drafter(echoing_drafter(target_model).items(), version=0)
    return engine


def echoing_drafter(target_model) -> dict[str, torch.Tensor]:
    """Predicts that the hidden state stays as it is, and so some tokens that are accepted."""
    weights = {
        name: torch.zeros_like(tensor)
        for name, tensor in EagleDrafter.for_target(target_model.config, seed=0).named_weights()
    }
    size = target_model.config.hidden_size
    weights["fc.weight"][:, size:] = torch.eye(size)
    return weights


def random_drafter(target_model, seed: int) -> dict[str, torch.Tensor]:
    return dict(EagleDrafter.for_target(target_model.config, seed=seed).named_weights())


# -- what it generates ----------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_embedded_engine(any_strategy, engine):
    prompts = make_prompts(6)
    rollouts = any_strategy.generate(prompts, GREEDY)
    expected = engine.generate(prompts, GREEDY)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in expected]
    assert [rollout.text for rollout in rollouts] == [rollout.text for rollout in expected]


def test_the_cache_can_be_emptied_straight_after_an_answer(sglang_by_strategy, target_model):
    """SGLang has answered, but may have a step under way that it began beside the last one."""
    engine = sglang_by_strategy("3_4_8")
    engine.load_policy(target_model.named_parameters(), version=0)
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    (prompt,) = make_prompts(1)
    for seed in range(40):
        engine.flush_cache()
        engine.generate([prompt], short, seed=seed)
        assert engine.stats().num_prompt_tokens == len(prompt.tokens)  # none of them was cached


@pytest.mark.parametrize("filters", FILTERS)
def test_tokens_follow_the_target_distribution(any_strategy, target_model, filters):
    """Three tokens among a few each: all responses by their probabilities, which are reported."""
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, **filters)
    (prompt,) = make_prompts(1)
    rollouts = any_strategy.generate([prompt], sampling, num_samples=600, seed=5)
    expected = joint_distribution(target_model, prompt.tokens, sampling)
    assert 8 <= len(expected) <= 60
    counts = dict.fromkeys(expected, 0)
    for rollout in rollouts:
        counts[rollout.tokens] += 1
        assert sum(rollout.logprobs) == pytest.approx(math.log(expected[rollout.tokens]), abs=1e-4)
    assert chi_square_p_value(counts, expected, len(rollouts)) > 1e-4
    if any_strategy.stats().row_steps:
        assert any_strategy.stats().accepted_by_depth[0] > 50  # else nothing was put to the test


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.3}])
def test_tokens_that_are_equally_likely_are_kept_together(any_strategy, target_model, filters):
    """Each second token is as likely as the one before: three best ones are four."""
    twins = copy.deepcopy(target_model)
    with torch.no_grad():
        embedding_VD = twins.get_input_embeddings().weight
        embedding_VD[1::2] = embedding_VD[::2]
    any_strategy.load_policy(twins.named_parameters(), version=1)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, **filters)
    (prompt,) = make_prompts(1)
    rollouts = any_strategy.generate([prompt], sampling, num_samples=400)
    expected = joint_distribution(twins, prompt.tokens, sampling)
    for first, second in expected:
        assert {(first ^ 1, second), (first, second ^ 1)} <= expected.keys()
    counts = dict.fromkeys(expected, 0)
    for rollout in rollouts:
        counts[rollout.tokens] += 1
        assert sum(rollout.logprobs) == pytest.approx(math.log(expected[rollout.tokens]), abs=1e-4)
    assert chi_square_p_value(counts, expected, len(rollouts)) > 1e-4


@pytest.mark.parametrize("strategy", ["off", "3_4_8"])
def test_tokens_without_seeds_follow_it_too_and_repeat_by_call(
    start_sglang, target_model, strategy
):
    """One request at a time, since which ones a step finds in the queue is a matter of time."""
    engine = start_sglang(strategy=strategy, deterministic=False)
    engine.load_policy(target_model.named_parameters(), version=0)
    (prompt,) = make_prompts(1)

    def response(**seeds: int) -> tuple[int, ...]:
        return engine.generate([prompt], LONG, **seeds)[0].tokens

    first = response(seed=3, rl_step=7)
    others = [response(seed=3, rl_step=8), response(seed=4, rl_step=7)]
    another = dataclasses.replace(prompt, prompt_id=prompt.prompt_id + 1)  # of the same tokens
    others.append(engine.generate([another], LONG, seed=3, rl_step=7)[0].tokens)
    assert len({first, *others}) == 4
    assert response(seed=3, rl_step=7) == first
    sampling = SamplingParams(max_tokens=3, top_p=0.5, ignore_eos=True)
    rollouts = engine.generate([prompt], sampling, num_samples=600)
    expected = joint_distribution(target_model, prompt.tokens, sampling)
    counts = dict.fromkeys(expected, 0)
    for rollout in rollouts:
        counts[rollout.tokens] += 1
        assert sum(rollout.logprobs) == pytest.approx(math.log(expected[rollout.tokens]), abs=1e-4)
    assert chi_square_p_value(counts, expected, len(rollouts)) > 1e-4
    engine.close()


def test_hidden_states_are_those_of_a_plain_forward(any_strategy, target_model):
    sampling = SamplingParams(max_tokens=20)
    prompts = make_prompts(3)
    for _ in range(2):  # the second time prompts could be taken from the cache
        rollouts = any_strategy.generate(
            prompts, sampling, num_samples=2, return_hidden_states=True
        )
        for rollout in rollouts:
            tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens[:-1])])
            with torch.no_grad():
                expected = target_model.model(tokens).last_hidden_state[0]
            torch.testing.assert_close(rollout.hidden_states, expected, atol=3e-5, rtol=1e-4)


def test_statistics_count_what_was_emitted(any_strategy):
    rollouts = any_strategy.generate(make_prompts(4), GREEDY, num_samples=2)
    stats = any_strategy.stats()
    for rollout in rollouts:
        assert sum(rollout.accept_lengths) == len(rollout.tokens) - 1
    assert stats.num_tokens == sum(len(rollout.tokens) for rollout in rollouts)
    assert stats.num_steps == max(len(rollout.accept_lengths) for rollout in rollouts)
    depth = any_strategy.strategy_selector.strategy.depth
    if depth == 0:
        assert stats.row_steps == 0
        assert stats.num_steps == GREEDY.max_tokens - 1
        return
    assert stats.row_steps == sum(rollout.num_verify_steps for rollout in rollouts)
    assert stats.offered_by_depth[0] == stats.row_steps
    assert stats.offered_by_depth[1:] == stats.accepted_by_depth[: depth - 1]
    assert stats.accepted_by_depth[0] > 0
    assert 1 < stats.accept_length <= depth + 1


def test_responses_end_before_the_context_does(any_strategy):
    strategy = any_strategy.strategy_selector.strategy
    (prompt,) = make_prompts(1, shortest=110)
    (rollout,) = any_strategy.generate([prompt], LONG)
    assert rollout.finish_reason == FinishReason.LENGTH
    assert len(rollout.tokens) == longest_sequence(128, [strategy]) - 110


def test_a_context_that_sglang_was_told_bounds_responses(start_sglang, target_model):
    engine = start_sglang(server_args={"context_length": 64})
    engine.load_policy(target_model.named_parameters(), version=0)
    prompts = make_prompts(2, shortest=40)
    rollouts = engine.generate(prompts, LONG)
    assert [len(rollout.prompt.tokens) + len(rollout.tokens) for rollout in rollouts] == [62, 62]
    with pytest.raises(ValueError, match="prompt 0 has 70 tokens"):
        engine.generate(make_prompts(1, shortest=70), LONG)
    engine.close()


# -- weights --------------------------------------------------------------------------------------


def test_a_policy_publication_reaches_the_policy_and_what_the_drafter_shares(
    sglang_engine, target_model, tmp_path
):
    (before,) = sglang_engine.weight_checksums()
    other = make_target(tmp_path, seed=1)
    sglang_engine.load_policy(other.named_parameters(), version=1)
    (after,) = sglang_engine.weight_checksums()
    unchanged = {name for name in before if before[name] == after[name]}
    norms = {name for name in before if "norm" in name and not name.startswith("draft.")}
    own = {name for name in before if name.startswith("draft.") and "embed" not in name}
    own -= {"draft.lm_head.weight"}
    assert unchanged == norms | own  # norms are ones in both models
    assert after["draft.model.embed_tokens.weight"] == after["model.embed_tokens.weight"]
    (rollout,) = sglang_engine.generate(make_prompts(1), GREEDY)
    tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)])
    with torch.no_grad():
        best = other(tokens[:, :-1]).logits[0].argmax(-1)
    assert rollout.tokens == tuple(best[len(rollout.prompt.tokens) - 1 :].tolist())


def test_a_drafter_publication_reaches_the_drafter_alone(sglang_engine, target_model):
    sglang_engine.load_drafter(random_drafter(target_model, seed=1).items(), version=1)
    tokens = [rollout.tokens for rollout in sglang_engine.generate(make_prompts(2), GREEDY)]
    (before,) = sglang_engine.weight_checksums()
    shared = {  # published checkpoints carry copies, which must not overwrite the policy's
        "embed_tokens.weight": torch.zeros(target_model.config.vocab_size, 32),
        "lm_head.weight": torch.zeros(target_model.config.vocab_size, 32),
    }
    weights = echoing_drafter(target_model) | shared
    sglang_engine.load_drafter(weights.items(), version=2)
    (after,) = sglang_engine.weight_checksums()
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(name.startswith("draft.") for name in changed)
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)
    assert sglang_engine.drafter_version == 2
    again = [rollout.tokens for rollout in sglang_engine.generate(make_prompts(2), GREEDY)]
    assert again == tokens


def test_a_better_drafter_is_accepted_more(sglang_engine, target_model):
    def accept_length(weights) -> float:
        sglang_engine.load_drafter(weights.items(), version=1)
        sglang_engine.generate(make_prompts(6), GREEDY)
        return sglang_engine.stats().accept_length

    dumb = {name: torch.zeros_like(one) for name, one in random_drafter(target_model, 0).items()}
    assert accept_length(echoing_drafter(target_model)) > accept_length(dumb) + 0.1


def test_small_buckets_carry_the_same_weights(start_sglang, sglang_engine, target_model):
    small = start_sglang(strategy="off", bucket_mib=1)
    small._running.weights.policy._bucket_bytes = 5000  # of 50 kB
    small.load_policy(target_model.named_parameters(), version=0)
    (few,), (many,) = sglang_engine.weight_checksums(), small.weight_checksums()
    assert many == {name: one for name, one in few.items() if not name.startswith("draft.")}
    small.close()


def test_nothing_is_generated_from_half_a_publication(sglang_engine, target_model):
    weights = dict(target_model.named_parameters())
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        sglang_engine.load_policy(weights.items(), version=7)
    assert sglang_engine.policy_version == -1
    with pytest.raises(ValueError, match="no weights"):
        sglang_engine.generate(make_prompts(1), GREEDY)
    sglang_engine.load_policy(target_model.named_parameters(), version=7)
    assert len(sglang_engine.generate(make_prompts(1), GREEDY)[0].tokens) == GREEDY.max_tokens


def test_misnamed_drafter_weights_are_refused_by_name(sglang_engine, target_model):
    good = random_drafter(target_model, seed=0)
    bad = good | {"fc.wait": good["fc.weight"]}
    del bad["fc.weight"]
    with pytest.raises(ValueError, match=r"missing \['fc.weight'\], unknown \['fc.wait'\]"):
        sglang_engine.load_drafter(bad.items(), version=3)
    with pytest.raises(ValueError, match="load_drafter"):
        sglang_engine.generate(make_prompts(1), GREEDY)
    sglang_engine.load_drafter(good.items(), version=3)
    assert sglang_engine.generate(make_prompts(1), GREEDY)


# -- what it refuses ------------------------------------------------------------------------------


def test_another_strategy_after_the_start_is_refused(sglang_engine):
    sglang_engine.strategy_selector = FixedStrategy("4_2_8")
    try:
        with pytest.raises(ValueError, match="runs strategy 3_4_8"):
            sglang_engine.generate(make_prompts(1), GREEDY)
    finally:
        sglang_engine.strategy_selector = FixedStrategy("3_4_8")


def test_a_response_that_the_cache_cannot_hold_is_refused(start_sglang, target_model):
    engine = start_sglang(strategy="off", server_args={"max_total_tokens": 64})
    engine.load_policy(target_model.named_parameters(), version=0)
    with pytest.raises(ValueError, match="mem_fraction_static"):
        engine.generate(make_prompts(1), LONG)
    with pytest.raises(ValueError, match="not started for hidden states"):
        engine.generate(make_prompts(1), SamplingParams(max_tokens=8), return_hidden_states=True)
    with pytest.raises(ValueError, match="memory_saver"):
        engine.sleep()
    engine.close()


# -- failures -------------------------------------------------------------------------------------


def scheduler_of(group: int) -> int:
    """The process of SGLang that runs the model; it names itself."""
    for pid in living_members(group):
        with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
            if "scheduler" in file.read():
                return pid
    raise AssertionError(f"no scheduler among {living_members(group)}")


@pytest.fixture
def new_groups():
    """Tells which process groups children of this process lead that did not before the test."""

    def groups() -> set[int]:
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children", encoding="utf-8") as file:
            return {pid for pid in map(int, file.read().split()) if os.getpgid(pid) == pid}

    before = groups()
    return lambda: groups() - before


@pytest.mark.parametrize(("victim", "strategy"), [("leader", "3_1_4"), ("scheduler", "5_2_12")])
def test_an_engine_killed_while_it_generates_is_named_and_leaves_nothing(
    sglang_by_strategy, target_model, victim, strategy
):
    """One that no later test needs: another is ten seconds of importing."""
    engine = sglang_by_strategy(strategy)
    engine.load_policy(target_model.named_parameters(), version=0)
    group = engine.process.group
    pid = group if victim == "leader" else scheduler_of(group)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    told = r"died during 'generate'.*(SIGKILL|scheduler.* is gone)[\s\S]*\.log"
    with pytest.raises(EngineError, match=told) as error:
        engine.generate(make_prompts(1), LONG, num_samples=2000)
    assert time.monotonic() - started < 30
    assert "    [" in str(error.value)  # lines of the log
    assert living_members(group) == []
    with pytest.raises(EngineError, match="start it anew"):
        engine.generate(make_prompts(1), GREEDY)


def test_an_engine_that_hangs_is_ended_at_its_time_limit(start_sglang, target_model):
    engine = start_sglang(strategy="off", generate_timeout_s=3)
    engine.load_policy(target_model.named_parameters(), version=0)
    group = engine.process.group
    os.kill(scheduler_of(group), signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer 'generate' within 3 s"):
        engine.generate(make_prompts(1), GREEDY)
    assert living_members(group) == []


@pytest.mark.parametrize(
    ("server_args", "reason"),
    [
        ({"max_total_tokens": 1}, "start"),  # its scheduler fails, and SGLang kills its parent
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_an_engine_that_does_not_start_is_named_and_leaves_nothing(
    start_sglang, tmp_path, new_groups, server_args, reason
):
    with pytest.raises(EngineError, match=reason) as error:
        start_sglang(server_args=server_args, log_dir=str(tmp_path))
    assert "Its log is" in str(error.value)
    (log,) = tmp_path.iterdir()
    assert log.read_text().splitlines()[-1].strip() in str(error.value)
    assert new_groups() == set()


def test_an_engine_that_takes_too_long_to_start_is_ended(start_sglang, new_groups):
    with pytest.raises(EngineError, match="did not answer 'start' within 1 s"):
        start_sglang(start_timeout_s=1)
    assert new_groups() == set()
