"""What the caches hold after speculative steps is what a fresh prefill computes."""

from collections import deque

import pytest
import torch

from fastrl.rollout.drafters.response_store import ResponseStore
from fastrl.rollout.torch_engine.engine import _requests
from fastrl.rollout.torch_engine.generation import Generation
from fastrl.rollout.torch_engine.ngram_drafting import NgramDrafting
from fastrl.rollout.torch_engine.prefill import prefill
from fastrl.rollout.torch_engine.requests import EndOfResponse
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.types import Prompt, SamplingParams
from tests.rollout.tiny_models import make_prompts
from tests.rollout.torch_engine.fakes import CyclingSelector

SAMPLING = SamplingParams(max_tokens=40, ignore_eos=True)


def generation_of(engine, strategies) -> Generation:
    loaded = engine._started()
    return Generation(
        target=loaded.target,
        cache=loaded.cache,
        drafting=loaded.drafting,
        ngram_drafting=NgramDrafting(ResponseStore()),
        selector=CyclingSelector(strategies),
        check_strategy=lambda strategy: None,
        end=EndOfResponse(loaded.tokenizer, loaded.eos_token_ids, SAMPLING, 128),
        sampling=SAMPLING,
        policy_version=0,
        return_hidden_states=True,
    )


def requests_of(prompts, num_samples=1):
    return _requests(prompts, num_samples, 0, 0)


@pytest.mark.parametrize("strategies", [["off"], ["3_3_10"], ["5_1_6"], ["6_2_20", "off", "2_2_5"]])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_kept_entries_equal_a_fresh_prefill(engine, strategies, num_steps):
    generation = generation_of(engine, strategies)
    queue = deque(requests_of(make_prompts(3), 2))
    with torch.inference_mode():
        generation._admit(queue)
        for _ in range(num_steps):
            generation._retire(generation._step())
        rows = generation._rows
        assert len(rows) == 6
        for row, request in enumerate(rows.requests):
            tokens = (*request.prompt.tokens, *request.tokens)
            cached = Prompt(prompt_id=0, tokens=tokens[:-1], text="", answer="")
            (fresh,) = prefill(generation._target, None, [cached], SAMPLING)
            entries = generation._cache.view_row(row, len(cached.tokens))
            torch.testing.assert_close(entries, fresh.cache_entries, atol=1e-5, rtol=1e-5)
            hidden = rows.hidden_BSD[row, : len(cached.tokens)]
            torch.testing.assert_close(hidden, fresh.hidden_TD, atol=1e-5, rtol=1e-5)
            assert rows.tokens_BS[row, : len(tokens)].tolist() == list(tokens)
            assert rows.lengths_B[row] == len(cached.tokens) == request.cached_length


def test_the_target_sees_each_prompt_once_and_each_node_once(engine, monkeypatch):
    """Switching speculation on and off re-prefills nothing."""
    tokens_seen = []
    forward = TargetModel.forward

    def counting(self, tokens_BT, positions_BT, view):
        tokens_seen.append(tokens_BT.numel())
        return forward(self, tokens_BT, positions_BT, view)

    monkeypatch.setattr(TargetModel, "forward", counting)
    selector = CyclingSelector(["3_3_10", "off", "off", "off", "4_1_5"])
    engine.strategy_selector = selector
    prompts = make_prompts(2)
    engine.generate(prompts, SAMPLING, num_samples=3)
    padded_prompts = 2 * max(len(prompt.tokens) for prompt in prompts)
    nodes = sum(s.batch_size * s.strategy.verify_tokens for s in selector.recorded)
    assert sum(tokens_seen) == padded_prompts + nodes


def test_hidden_states_are_those_of_a_plain_forward(engine, target_model):
    engine.strategy_selector = CyclingSelector(["3_3_10", "off", "4_4_16"])
    rollouts = engine.generate(
        make_prompts(3), SamplingParams(max_tokens=20), num_samples=2, return_hidden_states=True
    )
    for rollout in rollouts:
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)])
        with torch.no_grad():
            expected = target_model.model(tokens[:, :-1]).last_hidden_state[0]
        torch.testing.assert_close(rollout.hidden_states, expected, atol=1e-5, rtol=1e-5)
        assert not rollout.hidden_states.is_inference()
