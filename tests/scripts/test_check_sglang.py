"""Checking that SGLang rollouts follow the policy: its statistics, and all of it in miniature."""

import importlib.util
import itertools
import random
from collections import Counter

import check_sglang
import pytest
from check_sglang import (
    Check,
    chi_square_p_value,
    clearest_prompt,
    joint_distribution,
    logit_gap,
    run,
    two_sample_p_value,
)
from sd_engines import SGLangOptions

from fastrl.rollout.bandit import InTurns
from fastrl.types import SamplingParams
from tests.rollout.tiny_models import make_drafter, make_prompts, make_target
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


def test_the_clearest_prompt_is_the_one_with_the_widest_margin(target_model_of_script):
    sampling = SamplingParams(max_tokens=2, top_k=3)
    prompts = make_prompts(5)
    prompt, distance = clearest_prompt(target_model_of_script, prompts, sampling)
    margins = {}
    for one in prompts:
        found = []
        for response in joint_distribution(target_model_of_script, one.tokens, sampling):
            for place in range(2):
                tokens = (*one.tokens, *response[:place])
                ordered = check_sglang._logits(target_model_of_script, tokens).sort().values
                found.append(float(ordered[-3] - ordered[-4]))
        margins[one.prompt_id] = min(found)
    assert distance == max(margins.values()) == margins[prompt.prompt_id]
    assert len(set(margins.values())) == 5


def test_gap_of_logits_where_responses_part(target_model_of_script):
    model = target_model_of_script
    prompt, ours = (5, 6, 7), (8, 9, 10)
    assert logit_gap(model, prompt, ours, ours) == 0
    logits_V = check_sglang._logits(model, (5, 6, 7, 8))
    expected = float((logits_V[9] - logits_V[11]).abs())
    assert logit_gap(model, prompt, ours, (8, 11, 3)) == expected > 0


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
    from transformers import AutoModelForCausalLM

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
        max_tokens=24,
        num_samples=300,
        sampling=SamplingParams(max_tokens=2, top_k=3, ignore_eos=True),
        dtype="float32",
        device="cpu",
        largest_gap=1e-3,
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
    exact = check_sglang.joint_distribution
    monkeypatch.setattr(  # as if the policy were another one: hotter
        check_sglang,
        "joint_distribution",
        lambda model, prompt, sampling: exact(
            model, prompt, SamplingParams(max_tokens=2, top_k=3, temperature=3.0)
        ),
    )
    assert not run(check)
    assert "failed" in capsys.readouterr().out
