"""The store is bounded, forgets the prompts asked longest ago, and survives a checkpoint."""

import io

import pytest
import torch

from fastrl.rollout.drafters.response_store import ResponseStore


def held(store):
    return {
        prompt_id: [list(response) for response in store.responses(prompt_id)]
        for prompt_id in range(10)
        if store.responses(prompt_id)
    }


def test_a_prompt_has_the_responses_of_the_last_time_it_was_asked():
    store = ResponseStore()
    store.put(3, [(1, 2), (5,)])
    store.put(4, [(7, 7, 7)])
    store.put(3, [(9, 9)])
    assert held(store) == {3: [[9, 9]], 4: [[7, 7, 7]]}
    assert store.num_tokens == 5
    assert list(store.responses(8)) == []


def test_prompts_asked_longest_ago_leave_first():
    store = ResponseStore(max_tokens=6)
    store.put(0, [(1, 1)])
    store.put(1, [(2, 2)])
    store.put(2, [(3, 3)])
    store.put(0, [(4, 4)])  # asked again: prompt 1 is the oldest now
    store.put(3, [(5,)])
    assert held(store) == {2: [[3, 3]], 0: [[4, 4]], 3: [[5]]}
    assert store.num_tokens == 5


def test_it_never_holds_more_than_its_bound():
    store = ResponseStore(max_tokens=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        prompt_id, num_responses, length = torch.randint(1, 10, (3,), generator=generator).tolist()
        store.put(prompt_id, [tuple(range(length))] * num_responses)
        kept = sum(len(response) for several in held(store).values() for response in several)
        assert kept == store.num_tokens <= 20
        # Of a group too large for it, as many as fit.
        assert len(store.responses(prompt_id)) == min(num_responses, 20 // length)


def test_a_bound_of_zero_keeps_nothing_and_a_negative_one_is_refused():
    store = ResponseStore(max_tokens=0)
    store.put(0, [(1, 2)])
    assert held(store) == {}
    with pytest.raises(ValueError, match="max_tokens must be >= 0"):
        ResponseStore(max_tokens=-1)


def test_a_resumed_store_holds_and_forgets_the_same():
    store = ResponseStore(max_tokens=10)
    for prompt_id, length in ((5, 3), (2, 2), (7, 3), (5, 3)):
        store.put(prompt_id, [tuple(range(length))])
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    resumed = ResponseStore(max_tokens=10)
    resumed.put(1, [(1,)])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert held(resumed) == held(store)
    for one in (store, resumed):
        one.put(9, [(0,) * 4])
    assert held(resumed) == held(store) == {7: [[0, 1, 2]], 5: [[0, 1, 2]], 9: [[0] * 4]}
    assert resumed.num_tokens == store.num_tokens


def test_a_smaller_store_takes_the_newest_that_fit():
    store = ResponseStore()
    for prompt_id in range(4):
        store.put(prompt_id, [(prompt_id,) * 3])
    smaller = ResponseStore(max_tokens=7)
    smaller.load_state_dict(store.state_dict())
    assert held(smaller) == {2: [[2] * 3], 3: [[3] * 3]}
