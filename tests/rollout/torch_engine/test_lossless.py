"""Speculation changes no token: whatever the drafter, the tree, the batch or the switching.

Rollouts of the engine are compared, token for token, with rollouts computed without an engine at
all: one at a time, transformers' eager attention, no cache, one uniform a position.
"""

import copy

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.sampling import (
    log_distribution,
    position_uniforms,
    request_key,
    sample_inverse_cdf,
)
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.tiny_models import (
    EOS,
    FAMILIES,
    VOCAB_SIZE,
    make_drafter,
    make_prompts,
    make_target,
)
from tests.rollout.torch_engine.fakes import STRATEGIES, CyclingSelector, ScriptedDrafting

NGRAM_STRATEGIES = ["ngram_1_1_2", "ngram_8_1_9", "ngram_3_3_10", "ngram_5_4_60"]

SAMPLINGS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=0.0),
    SamplingParams(max_tokens=24, temperature=0.6, top_p=0.9),
    SamplingParams(max_tokens=24, temperature=1.3, top_k=8, min_p=0.02),
]


def naive_rollout(model, prompt, sampling, *, seed, rl_step, sample_index):
    """Tokens and log-probabilities, a full forward for each token."""
    tokens, logprobs = list(prompt.tokens), []
    key = torch.tensor([request_key(seed, rl_step, prompt.prompt_id, sample_index)])
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1:]
        distribution = log_distribution(logits, sampling)
        position = torch.tensor([len(tokens) - len(prompt.tokens)])
        token = sample_inverse_cdf(distribution, position_uniforms(key, position)).item()
        tokens.append(token)
        logprobs.append(distribution[0, token].item())
        if token == EOS or len(logprobs) == sampling.max_tokens:
            return tokens[len(prompt.tokens) :], logprobs


@pytest.fixture(scope="module")
def references(target_model):
    """Naive rollouts by sampling parameters."""
    prompts = make_prompts(4)
    return {
        sampling: [
            naive_rollout(target_model, prompt, sampling, seed=7, rl_step=3, sample_index=sample)
            for prompt in prompts
            for sample in range(3)
        ]
        for sampling in SAMPLINGS
    }


def generate(engine, sampling, count=4):
    return engine.generate(make_prompts(count), sampling, num_samples=3, seed=7, rl_step=3)


def assert_equal_to(rollouts, reference):
    assert [list(r.tokens) for r in rollouts] == [tokens for tokens, _ in reference]
    for rollout, (_, logprobs) in zip(rollouts, reference, strict=True):
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs), torch.tensor(logprobs), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("strategy", ["off", *STRATEGIES, *NGRAM_STRATEGIES])
def test_every_strategy_gives_the_naive_rollouts(engine, references, strategy, sampling):
    engine.strategy_selector = FixedStrategy(strategy)
    assert_equal_to(generate(engine, sampling), references[sampling])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_switching_strategy_and_speculation_each_step_changes_nothing(engine, references, sampling):
    engine.strategy_selector = CyclingSelector(["off", "4_4_16", "off", "off", *STRATEGIES])
    assert_equal_to(generate(engine, sampling), references[sampling])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_n_grams_and_a_learned_drafter_in_turns_change_nothing(engine, references, sampling):
    mixed = ["ngram_4_2_9", "3_3_10", "off", "ngram_8_1_9", "5_1_6", "ngram_2_3_7"]
    engine.strategy_selector = CyclingSelector(mixed)
    for _ in range(2):  # the second time the responses themselves are drafted from
        assert_equal_to(generate(engine, sampling), references[sampling])


@pytest.mark.parametrize("strategy", ["ngram_6_1_7", "ngram_4_3_16"])
def test_drafting_the_responses_themselves_changes_no_token(engine, references, strategy):
    """Nearly all of a draft is accepted, over and over."""
    sampling = SAMPLINGS[0]
    engine.strategy_selector = FixedStrategy(strategy)
    generate(engine, sampling)
    rollouts = generate(engine, sampling)
    assert_equal_to(rollouts, references[sampling])
    assert engine.stats().accept_length > 2.5


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_perfect_drafter_changes_no_token_and_saves_most_steps(engine, references, sampling):
    engine.strategy_selector = FixedStrategy("off")
    known = generate(engine, sampling)
    engine._started().drafting = ScriptedDrafting(known, is_right=True, vocab_size=VOCAB_SIZE)
    engine.strategy_selector = FixedStrategy("5_1_6")
    rollouts = generate(engine, sampling)
    assert_equal_to(rollouts, references[sampling])
    for rollout in rollouts:
        after_first = len(rollout.tokens) - 1
        assert len(rollout.accept_lengths) == -(-after_first // 6)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_an_adversarial_drafter_changes_no_token(engine, references, sampling):
    engine.strategy_selector = FixedStrategy("off")
    known = generate(engine, sampling)
    engine._started().drafting = ScriptedDrafting(known, is_right=False, vocab_size=VOCAB_SIZE)
    engine.strategy_selector = FixedStrategy("5_1_6")
    rollouts = generate(engine, sampling)
    assert_equal_to(rollouts, references[sampling])
    assert all(set(rollout.accept_lengths) <= {1} for rollout in rollouts)


@pytest.mark.parametrize("max_batch_size", [1, 2, 5, 12])
def test_the_batch_a_rollout_shares_does_not_matter(
    folders, target_model, references, max_batch_size
):
    engine = TorchEngine(drafter_path=str(folders[1]), max_batch_size=max_batch_size, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    engine.strategy_selector = CyclingSelector(["3_3_10", "off", "2_2_5"])
    assert_equal_to(generate(engine, SAMPLINGS[0]), references[SAMPLINGS[0]])


def test_n_grams_need_no_drafter(folders, target_model, references):
    engine = TorchEngine(strategy="ngram_4_2_9", max_batch_size=5, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    assert_equal_to(generate(engine, SAMPLINGS[0]), references[SAMPLINGS[0]])
    assert set(engine.stats().steps_by_strategy) == {"ngram_4_2_9"}


def test_a_drafter_published_in_between_changes_no_token(
    engine, references, target_model, tmp_path
):
    engine.strategy_selector = FixedStrategy("4_4_16")
    generate(engine, SAMPLINGS[0])
    other = make_drafter(tmp_path, target_model, seed=99)
    engine.load_drafter(other.named_weights(), version=1)
    assert_equal_to(generate(engine, SAMPLINGS[0]), references[SAMPLINGS[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_exactly(tmp_path, family):
    """Tied and untied heads, biases, query norms, a head size of its own, a sliding window."""
    model = make_target(tmp_path / "target", family)
    model.set_attn_implementation("eager")
    make_drafter(tmp_path / "drafter", model)
    engine = TorchEngine(drafter_path=str(tmp_path / "drafter"), max_batch_size=4, device="cpu")
    engine.start(str(tmp_path / "target"))
    engine.load_policy(model.named_parameters(), version=0)
    sampling = SamplingParams(max_tokens=30)
    reference = [
        naive_rollout(model, prompt, sampling, seed=7, rl_step=3, sample_index=sample)
        for prompt in make_prompts(2)
        for sample in range(3)
    ]
    assert max(len(tokens) for tokens, _ in reference) > 12  # past the sliding window
    for strategy in ("off", "4_1_5", "3_3_12", "ngram_3_3_12"):
        engine.strategy_selector = FixedStrategy(strategy)
        assert_equal_to(generate(engine, sampling, count=2), reference)


def test_a_tree_deeper_than_the_sliding_window_is_verified_exactly(tmp_path):
    model = make_target(tmp_path / "target", "mistral", sliding_window=3)
    model.set_attn_implementation("eager")
    make_drafter(tmp_path / "drafter", model)
    engine = TorchEngine(drafter_path=str(tmp_path / "drafter"), max_batch_size=4, device="cpu")
    engine.start(str(tmp_path / "target"))
    engine.load_policy(model.named_parameters(), version=0)
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    engine.strategy_selector = FixedStrategy("off")
    known = generate(engine, sampling, count=2)
    reference = [
        naive_rollout(model, prompt, sampling, seed=7, rl_step=3, sample_index=sample)
        for prompt in make_prompts(2)
        for sample in range(3)
    ]
    assert_equal_to(known, reference)
    engine._started().drafting = ScriptedDrafting(known, is_right=True, vocab_size=VOCAB_SIZE)
    engine.strategy_selector = FixedStrategy("6_1_7")
    assert_equal_to(generate(engine, sampling, count=2), reference)


def test_another_seed_step_prompt_or_sample_gives_other_tokens(engine):
    sampling = SamplingParams(max_tokens=24, temperature=1.5)
    prompt = make_prompts(1)
    base = engine.generate(prompt, sampling, num_samples=2, seed=0, rl_step=0)
    other_seed = engine.generate(prompt, sampling, num_samples=1, seed=1, rl_step=0)
    other_step = engine.generate(prompt, sampling, num_samples=1, seed=0, rl_step=1)
    streams = [r.tokens for r in (*base, *other_seed, *other_step)]
    assert len(set(streams)) == 4
    again = engine.generate(prompt, sampling, num_samples=2, seed=0, rl_step=0)
    assert [r.tokens for r in again] == [r.tokens for r in base]


def test_bfloat16_rollouts_follow_the_bfloat16_model(folders, target_model):
    """In bfloat16 logits differ by rounding from batch to batch: tokens may, the law may not."""
    engine = TorchEngine(
        drafter_path=str(folders[1]), strategy="3_3_10", dtype="bfloat16", device="cpu"
    )
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    rollouts = generate(engine, SAMPLINGS[0])
    model = copy.deepcopy(target_model).to(torch.bfloat16)
    for rollout in rollouts:
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0, len(rollout.prompt.tokens) - 1 :]
        logprobs = log_distribution(logits, SAMPLINGS[0])
        expected = logprobs.gather(1, torch.tensor(rollout.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=0.35, rtol=0)
