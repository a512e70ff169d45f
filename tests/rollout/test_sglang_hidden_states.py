"""Hidden states that SGLang returns, by what it does with long batches and with a full cache."""

import random

import numpy as np
import pytest
import torch

from fastrl.rollout.bandit import InTurns
from fastrl.rollout.sglang_hidden_states import in_order
from fastrl.types import Prompt, SamplingParams
from tests.rollout.test_sglang_engine import echoing_drafter

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


# -- in order -------------------------------------------------------------------------------------


def row(place: int) -> list[float]:
    return [float(place), -float(place)]


def rows(start: int, end: int) -> list[list[float]]:
    return [row(place) for place in range(start, end)]


@pytest.mark.parametrize(
    "entries",
    [
        [rows(0, 3), row(3), row(4), row(5), row(6)],
        [rows(0, 3), row(3), rows(0, 5), row(5), row(6)],  # came back once
        [rows(0, 3), row(3), rows(2, 5), rows(3, 6), rows(0, 7)],  # thrice, partly from the cache
    ],
)
def test_rows_are_put_where_their_tokens_are(entries):
    """Three tokens of prompt and five of response, whose last was never read."""
    np.testing.assert_array_equal(in_order(entries, 3), np.array(rows(0, 7), dtype=np.float32))


def test_missing_rows_are_left_out():
    found = in_order([rows(1, 3), row(3)], 3)
    np.testing.assert_array_equal(found, np.array(rows(1, 4), dtype=np.float32))


# -- real SGLang ----------------------------------------------------------------------------------


def prompts_of(lengths, vocab_size: int) -> list[Prompt]:
    """Each another one: what they share could come from the cache."""
    rng = random.Random(0)
    return [
        Prompt(
            prompt_id=number,
            tokens=tuple(rng.randrange(vocab_size) for _ in range(length)),
            text="",
            answer="",
        )
        for number, length in enumerate(lengths)
    ]


def check(rollouts, target_model) -> None:
    for rollout in rollouts:
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens[:-1])])
        with torch.no_grad():
            expected = target_model.model(tokens).last_hidden_state[0]
        torch.testing.assert_close(rollout.hidden_states, expected, atol=3e-5, rtol=1e-4)


CHUNK = 64
ENGINES = {
    "off": {"strategy": "off"},
    "3_4_8": {"strategy": "3_4_8"},
    "pool": {"selector": InTurns(("off", "off", "3_4_8", "5_2_12"))},
}


@pytest.fixture(params=ENGINES)
def start(request, start_sglang, target_model):
    """Starts stock SGLang or one with the plugin, whose prefills take 64 tokens at once."""
    engines = []

    def start_with(deterministic: bool = True, **server_args: object):
        arguments = {"chunked_prefill_size": CHUNK, "max_prefill_tokens": CHUNK, **server_args}
        engine = start_sglang(
            hidden_states=True,
            deterministic=deterministic,
            server_args=arguments,
            **ENGINES[request.param],
        )
        engines.append(engine)
        engine.load_policy(target_model.named_parameters(), version=0)
        if request.param != "off":
            engine.load_drafter(echoing_drafter(target_model).items(), version=0)
        return engine

    yield start_with
    for engine in engines:
        engine.close()


@pytest.mark.sglang
def test_a_batch_longer_than_a_chunk(start, target_model):
    """No prompt is; then some are."""
    engine = start()
    lengths = random.Random(1).choices(range(3, 13), k=40)
    assert sum(lengths) > 4 * CHUNK
    vocab_size = target_model.config.vocab_size
    short = prompts_of(lengths, vocab_size)
    check(engine.generate(short, GREEDY, return_hidden_states=True), target_model)
    once = SamplingParams(max_tokens=1, temperature=0)  # a response that ends with its prefill
    check(engine.generate(short, once, return_hidden_states=True), target_model)
    long = prompts_of((90, 70, 5, 65, 64, 80), vocab_size)
    check(engine.generate(long, GREEDY, return_hidden_states=True, num_samples=2), target_model)


@pytest.mark.sglang
@pytest.mark.parametrize("has_prefix_cache", [False, True])
def test_responses_that_are_set_aside_and_come_back(
    start, target_model, monkeypatch, has_prefix_cache
):
    """SGLang's own switch has it happen every few steps, whatever room there is."""
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    engine = start(deterministic=not has_prefix_cache)  # SGLang has none then on a CPU
    lengths = random.Random(2).choices(range(3, 30), k=10)
    prompts = prompts_of([*lengths, 80], target_model.config.vocab_size)
    rollouts = engine.generate(prompts, GREEDY, return_hidden_states=True)
    log = engine.process.log_path.read_text()
    assert log.count("Testing retraction") > 5
    assert f"'disable_radix_cache': {not has_prefix_cache}" in log
    check(rollouts, target_model)


@pytest.mark.sglang
def test_a_cache_that_is_full(start_sglang, target_model):
    engine = start_sglang(
        strategy="3_4_8",
        hidden_states=True,
        server_args={"max_total_tokens": 400, "schedule_conservativeness": 0.01},
    )
    engine.load_policy(target_model.named_parameters(), version=0)
    lengths = random.Random(2).choices(range(3, 30), k=16)
    sampling = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    prompts = prompts_of(lengths, target_model.config.vocab_size)
    rollouts = engine.generate(prompts, sampling, return_hidden_states=True)
    assert "Retract requests" in engine.process.log_path.read_text()
    check(rollouts, target_model)
    engine.close()
