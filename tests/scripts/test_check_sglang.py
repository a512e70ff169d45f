"""Checking that SGLang rollouts follow the policy: its statistics, and all of it in miniature."""

import dataclasses
import functools
import importlib.util
import itertools
import random
from collections import Counter

import check_sglang
import pytest
import torch
from check_sglang import Check, run, steadiest_prompt
from policy_statistics import (
    chi_square_p_value,
    excess_p_value,
    joint_distribution,
    noncentrality,
    shortfalls,
    two_sample_p_value,
)
from sd_engines import SGLangOptions
from transformers import AutoModelForCausalLM

from fastrl.rollout.bandit import InTurns
from fastrl.types import SamplingParams
from tests.rollout.tiny_models import make_drafter, make_target
from tests.sglang_cpu import environment

EXPECTED = {(i, j): 0.1 * (i + 1) * (0.7 if j else 0.3) for i in range(4) for j in range(2)}


def drawn(expected, total, seed):
    rng = random.Random(seed)
    return Counter(rng.choices([*expected], [*expected.values()], k=total))


def test_p_values_of_true_samples_are_spread_evenly():
    """A test that holds its level: of 200 lots, about a tenth below 0.1."""
    lots = [drawn(EXPECTED, 2000, seed) for seed in range(201)]
    exact = [chi_square_p_value(lot, EXPECTED, 2000) for lot in lots]
    of_neighbours = [two_sample_p_value(*pair) for pair in itertools.pairwise(lots)]
    for values in (exact, of_neighbours):
        assert 8 <= sum(value < 0.1 for value in values) <= 36
        assert min(values) > 1e-4


def test_a_small_bias_is_found():
    biased = dict(EXPECTED)
    biased[(3, 1)] += 0.03
    biased[(0, 1)] -= 0.03
    biased_lot, true_lot = drawn(biased, 8000, 1), drawn(EXPECTED, 8000, 2)
    assert chi_square_p_value(biased_lot, EXPECTED, 8000) < 1e-4
    assert two_sample_p_value(biased_lot, true_lot) < 1e-4


def test_what_has_no_probability_cannot_be():
    assert chi_square_p_value({(9, 9): 1, (0, 0): 99}, EXPECTED, 100) == 0
    assert chi_square_p_value({(9, 9): 0, **drawn(EXPECTED, 100, 3)}, EXPECTED, 100) > 1e-4


def test_unlisted_outcomes_are_counted_together():
    listed = {one: chance for one, chance in EXPECTED.items() if one[0]}
    for seed in range(3):
        assert chi_square_p_value(drawn(EXPECTED, 2000, seed), listed, 2000) > 1e-3
    more = dict(EXPECTED)
    more[(0, 1)] += 0.05
    more[(3, 1)] -= 0.05
    assert chi_square_p_value(drawn(more, 4000, 3), listed, 4000) < 1e-4


def test_rounding_is_allowed_for_and_no_more():
    """Samples of a distribution that is a little off are as likely as any if that is allowed."""
    moved = dict(EXPECTED)
    moved[(3, 1)] += 0.012
    moved[(0, 1)] -= 0.012
    allowed = noncentrality(moved, EXPECTED, 8000)
    values = [
        chi_square_p_value(drawn(moved, 8000, seed), EXPECTED, 8000, allowed) for seed in range(200)
    ]
    assert 8 <= sum(value < 0.1 for value in values) <= 36
    assert 70 <= sum(value < 0.5 for value in values) <= 130
    central = [chi_square_p_value(drawn(moved, 8000, i), EXPECTED, 8000) for i in range(200)]
    assert sum(value < 0.1 for value in central) > 100
    assert noncentrality(EXPECTED, EXPECTED, 8000) < 1e-9
    listed = {one: chance for one, chance in EXPECTED.items() if one[0]}
    of_rest = 8000 * 0.012**2 * (1 / EXPECTED[(3, 1)] + 1 / (1 - sum(listed.values())))
    assert noncentrality(moved, listed, 8000) == pytest.approx(of_rest)


def test_the_sampled_prompt_is_the_one_that_rounding_moves_least(target_model_of_script, folder):
    """Against every response's probability, one token at a time, in both dtypes."""
    model = target_model_of_script
    rounded = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.bfloat16).eval()
    check = Check(
        model=str(folder / "target"),
        drafter="none",
        num_prompts=5,
        prompt_tokens=24,
        num_samples=400,
        sampling=SamplingParams(max_tokens=2, top_k=3),
        least_outcomes=9,
    )
    moved = {}
    for prompt in check_sglang._prompts(check):
        true, expected = (
            one_by_one(one, prompt.tokens, check.sampling) for one in (rounded, model)
        )
        assert joint_distribution(model, prompt.tokens, check.sampling) == pytest.approx(expected)
        likely = {one: chance for one, chance in expected.items() if chance > 5 / 400}
        if len(likely) >= 9:
            moved[prompt.prompt_id] = sum(
                400 * (true.get(one, 0.0) - chance) ** 2 / chance for one, chance in likely.items()
            )
    sampled = steadiest_prompt(model, rounded, check)
    assert len(moved) > 1
    assert sampled.prompt.prompt_id == min(moved, key=moved.__getitem__)
    assert sampled.rounding == pytest.approx(min(moved.values()), rel=1e-3)
    assert len(sampled.expected) == 9
    with pytest.raises(ValueError, match="lower least_outcomes"):
        steadiest_prompt(model, rounded, dataclasses.replace(check, least_outcomes=10))


def one_by_one(model, prompt, sampling):
    """By response of two tokens."""
    found = {}
    for first in range(model.config.vocab_size):
        chance = probability(model, prompt, first, sampling)
        if chance:
            for second in range(model.config.vocab_size):
                found[first, second] = chance * probability(
                    model, (*prompt, first), second, sampling
                )
    return {one: chance for one, chance in found.items() if chance}


@functools.cache
def probability(model, context, token, sampling):
    with torch.no_grad():
        logits_V = model(torch.tensor([context])).logits[0, -1].float()
    best = logits_V.topk(sampling.top_k)
    if token not in best.indices:
        return 0.0
    return float(best.values.softmax(0)[best.indices.tolist().index(token)])


def test_shortfalls_of_a_response_token_by_token(target_model_of_script):
    model = target_model_of_script
    contexts = [((5, 6, 7), (8, 9, 10)), ((3, 4), (11,)), ((9, 8, 7, 6), (2, 3))]
    found = shortfalls(model, contexts)
    for (prompt, response), short_T in zip(contexts, found, strict=True):
        assert len(short_T) == len(response)
        for place, token in enumerate(response):
            with torch.no_grad():
                logits_V = model(torch.tensor([(*prompt, *response[:place])])).logits[0, -1]
            expected = float(logits_V.max() - logits_V[token])
            assert float(short_T[place]) == pytest.approx(expected, abs=1e-5)
    assert max(map(float, torch.cat(found))) > 0.1
    best = shortfalls(model, contexts, other=model)
    assert [len(one) for one in best] == [3, 1, 2]
    assert not torch.cat(best).any()


def test_shortfalls_of_what_another_model_would_take(target_model_of_script, folder):
    other = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    with torch.no_grad():
        other.model.norm.weight.neg_()
        logits_V, other_V = (
            model(torch.tensor([[5, 6]])).logits[0, -1] for model in (target_model_of_script, other)
        )
    ((short,),) = shortfalls(target_model_of_script, [((5, 6), (7,))], other=other)
    expected = float(logits_V.max() - logits_V[other_V.argmax()])
    assert float(short) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_more_misses_than_chance_explains():
    assert excess_p_value(0, 100, 0, 100) == 1
    assert excess_p_value(10, 1000, 10, 1000) == pytest.approx(0.5)
    assert excess_p_value(60, 1000, 10, 1000) < 1e-6
    assert excess_p_value(10, 1000, 60, 1000) > 0.999
    rng = random.Random(0)
    values = [
        excess_p_value(
            sum(rng.random() < 0.05 for _ in range(900)),
            900,
            sum(rng.random() < 0.05 for _ in range(1100)),
            1100,
        )
        for _ in range(300)
    ]
    assert 15 <= sum(value < 0.1 for value in values) <= 48


def test_strategies_come_in_turns_and_excluded_ones_are_left_out():
    selector = InTurns(["off", "2_1_3", "4_2_8"])
    tree = selector.strategies[1]
    assert [str(selector.select(4, 10)) for _ in range(4)] == ["off", "2_1_3", "4_2_8", "off"]
    selector.exclude([tree])
    assert str(selector.select(4, 10)) == "off"
    with pytest.raises(ValueError, match="at least one strategy"):
        InTurns([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checked")
    make_drafter(root / "drafter", make_target(root / "target"))
    return root


@pytest.fixture
def target_model_of_script(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "target").eval()


@pytest.mark.sglang
def test_real_sglang_passes_and_a_wrong_policy_does_not(folder, monkeypatch, capsys):
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    check = Check(
        model=str(folder / "target"),
        drafter=str(folder / "drafter"),
        strategies=["3_1_4", "3_4_8"],
        num_prompts=4,
        prompt_tokens=24,
        max_tokens=24,
        num_samples=300,
        sampling=SamplingParams(max_tokens=2, ignore_eos=True),
        least_outcomes=8,
        dtype="float32",
        device="cpu",
        sglang=SGLangOptions(
            mem_fraction_static=0.1,
            attention_backend="intel_amx",
            server_args={
                "disable_cuda_graph": True,
                "max_total_tokens": 4096,
                "skip_server_warmup": True,
                "sleep_on_idle": True,
            },
        ),
    )
    assert run(check)
    assert "in turns" in capsys.readouterr().out
    steadiest = check_sglang.steadiest_prompt

    def of_another_policy(model, rounded, check):  # a colder one
        sampled = steadiest(model, rounded, check)
        colder = dataclasses.replace(check.sampling, temperature=0.6)
        expected = joint_distribution(model, sampled.prompt.tokens, colder, 5 / check.num_samples)
        return dataclasses.replace(sampled, expected=expected)

    monkeypatch.setattr(check_sglang, "steadiest_prompt", of_another_policy)
    assert not run(check)
    assert "failed" in capsys.readouterr().out
