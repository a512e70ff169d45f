"""N-gram strategies in the engine: what they draft from, what they save, what they cost."""

import itertools
from collections import deque

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.response_store import ResponseStore
from fastrl.rollout.engine import CostQuery
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.rollout.torch_engine.ngram_drafting import NgramDrafting
from fastrl.rollout.torch_engine.rows import LiveRows, Request
from fastrl.types import DraftStrategy, Prompt, SamplingParams
from tests.rollout.tiny_models import VOCAB_SIZE, make_prompts
from tests.rollout.torch_engine.fakes import CyclingSelector
from tests.rollout.torch_engine.test_cache_after_acceptance import generation_of, requests_of

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
CHAIN = DraftStrategy.parse("ngram_4_1_5")
PROMPT = Prompt(prompt_id=5, tokens=(2, 3), text="", answer="")


def rows_of(*requests: Request) -> LiveRows:
    """Live rows that hold what the drafting looks at."""
    rows = LiveRows(max(len(requests), 1), 0, torch.float32, torch.device("cpu"))
    rows.reserve(64)
    for request in requests:
        first, *rest = request.tokens
        row = rows.admit(request, torch.zeros(0), torch.tensor(first))
        for token in rest:
            rows.lengths_B[row] += 1
            rows.tokens_BS[row, rows.lengths_B[row]] = token
    return rows


def request(place: int, tokens: list[int], prompt: Prompt = PROMPT) -> Request:
    return Request(prompt=prompt, sample_index=place, place=place, key=place, tokens=tokens)


def drafting_of(*requests: Request, store: ResponseStore | None = None) -> NgramDrafting:
    drafting = NgramDrafting(store or ResponseStore())
    for one in requests:
        drafting.admit(one)
    return drafting


def test_siblings_are_drafted_from_live_or_finished_and_other_prompts_are_not():
    other = Prompt(prompt_id=6, tokens=(2, 3), text="", answer="")
    live, finished, stranger = (
        request(0, [7, 8]),
        request(1, [7, 8, 9, 10, 11]),
        request(2, [7, 8], other),
    )
    drafting = drafting_of(live, finished, stranger)
    tree = drafting.draft(rows_of(live, stranger), CHAIN)
    assert tree.tokens_BN[0].tolist() == [8, 9, 10, 11]
    assert tree.tokens_BN[1].tolist() == [8, 0, 0, 0]  # padding alone
    finished.tokens.append(12)
    live.tokens.append(9)
    tree = drafting.draft(rows_of(live), CHAIN)
    assert tree.tokens_BN[0].tolist() == [9, 10, 11, 12]


def test_responses_of_the_call_before_are_drafted_from_and_yield_to_newer_ones():
    store = ResponseStore()
    store.put(5, [(7, 8, 20, 21)])
    row = request(0, [7, 8])
    tree = drafting_of(row, store=store).draft(rows_of(row), CHAIN)
    assert tree.tokens_BN[0].tolist() == [8, 20, 21]
    sibling = request(1, [7, 8, 30])
    tree = drafting_of(row, sibling, store=store).draft(rows_of(row), CHAIN)
    assert tree.tokens_BN[0, 1] == 30


def test_rows_have_a_reference_once_a_sibling_is_finished_or_the_prompt_was_asked_before():
    known = Prompt(prompt_id=6, tokens=(2, 3), text="", answer="")
    store = ResponseStore()
    store.put(6, [[9, 10]])
    first, second, other = request(0, [7]), request(1, [7]), request(2, [7], known)
    drafting = drafting_of(first, second, other, store=store)
    assert drafting.num_referenced(rows_of(first, second)) == 0
    assert drafting.num_referenced(rows_of(first, second, other)) == 1
    drafting.finish(first)
    assert drafting.num_referenced(rows_of(second, other)) == 2


def test_selectors_are_told_of_references_before_a_step_and_after_it(bare_engine):
    """Two rows at a time, of prompts with four samples each."""
    told = []

    class Told(CyclingSelector):
        def select(self, batch_size, context_tokens, referenced_rows=0):
            told.append(referenced_rows)
            return super().select(batch_size, context_tokens, referenced_rows)

    selector = bare_engine.strategy_selector = Told(["off", "ngram_8_1_9"])
    bare_engine.max_batch_size = 2
    bare_engine.generate(make_prompts(2), GREEDY, num_samples=4)
    assert told == [stats.referenced_rows for stats in selector.recorded]
    assert told[0] == 0
    assert told[-1] == selector.recorded[-1].batch_size
    first_time = len(told)
    bare_engine.generate(make_prompts(2), GREEDY, num_samples=4)
    assert told[first_time:] == [s.batch_size for s in selector.recorded[first_time:]]


def test_a_batch_with_nothing_to_draft_is_plain_decoding():
    rows = [request(0, [7]), request(1, [8])]
    for strategy in ("ngram_4_1_5", "ngram_3_3_10"):
        tree = drafting_of(*rows).draft(rows_of(*rows), DraftStrategy.parse(strategy))
        assert tree.num_nodes == 1
        assert tree.is_chain  # verified without tree mask, nothing to move
        assert tree.tokens_BN.tolist() == [[7], [8]]


def test_trees_are_as_large_as_the_largest_draft():
    rows = [request(0, [7, 8]), request(1, [7, 8, 9])]
    drafting = drafting_of(*rows)
    tree = drafting.draft(rows_of(*rows), DraftStrategy.parse("ngram_3_3_22"))
    assert (tree.num_nodes, tree.depth) == (2, 1)
    assert tree.tokens_BN.tolist()[0] == [8, 9]


def test_prompts_no_row_works_on_give_their_index_back_and_can_be_taken_up_again():
    other = Prompt(prompt_id=6, tokens=(4,), text="", answer="")
    first, second = request(0, [7, 8, 7]), request(1, [9, 9], other)
    drafting = drafting_of(first, second)
    before = drafting.draft(rows_of(first), CHAIN)
    drafting.draft(rows_of(second), CHAIN)
    held = [group.index is not None for group in drafting._groups.values()]
    assert held == [False, True]
    again = drafting.draft(rows_of(first), CHAIN)
    assert torch.equal(before.tokens_BN, again.tokens_BN)


def test_rows_that_moved_or_started_late_draft_from_their_own_text(engine):
    generation = generation_of(engine, ["ngram_3_2_7", "off", "3_3_10"])
    queue = deque(requests_of(make_prompts(5, shortest=3), 3))
    generation._end._stop_ids = frozenset(range(0, VOCAB_SIZE, 6))
    num_steps = checked = 0
    with torch.inference_mode():
        while queue or generation._rows.requests:
            generation._admit(queue)
            if not generation._rows.requests:
                continue
            rows = generation._rows
            tree = generation._ngram_drafting.draft(rows, DraftStrategy.parse("ngram_4_1_5"))
            assert tree.tokens_BN[:, 0].tolist() == rows.last_tokens().tolist()
            for row, (request, drafted) in enumerate(
                zip(rows.requests, tree.tokens_BN[:, 1:].tolist(), strict=True)
            ):
                whole = [*request.prompt.tokens, *request.tokens]
                assert rows.tokens_BS[row, : len(whole)].tolist() == whole
                pairs = {
                    pair
                    for other in generation._ngram_drafting._groups[id(request.prompt)].requests
                    for text in [[*other.prompt.tokens, *other.tokens]]
                    for pair in itertools.pairwise(text)
                }
                if drafted and (whole[-1], drafted[0]) in pairs:
                    checked += 1
                else:
                    assert drafted[:1] in ([], [0])  # nothing known follows it
            generation._retire(generation._step())
            num_steps += 1
    assert checked > 20
    assert num_steps > 10


# -- in the engine --------------------------------------------------------------------------------


@pytest.fixture
def bare_engine(folders, target_model):
    """An engine without a drafter."""
    engine = TorchEngine(strategy="ngram_8_1_9", max_batch_size=6, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


def decode_steps(rollouts):
    return sum(len(rollout.accept_lengths) for rollout in rollouts)


def test_asking_again_at_temperature_0_takes_nearly_everything_from_the_last_time(bare_engine):
    prompts = make_prompts(3)
    first = bare_engine.generate(prompts, GREEDY)
    again = bare_engine.generate(prompts, GREEDY)
    assert [r.tokens for r in again] == [r.tokens for r in first]
    fewest = sum(-(-(len(r.tokens) - 1) // 9) for r in again)
    assert decode_steps(again) <= fewest + 3
    assert decode_steps(first) > 1.5 * decode_steps(again)


def test_a_response_like_its_sibling_s_is_taken_in_long_strides(bare_engine):
    """Those that start late find whole responses to draft from."""
    prompt = make_prompts(1)
    one = bare_engine.generate(prompt, GREEDY, num_samples=1)
    bare_engine._responses.clear()
    rollouts = bare_engine.generate(prompt, GREEDY, num_samples=12)
    assert all(rollout.tokens == one[0].tokens for rollout in rollouts)
    late = rollouts[6:]  # the first six filled the rows
    fewest = sum(-(-(len(r.tokens) - 1) // 9) for r in late)
    assert decode_steps(late) <= fewest + 6


def test_switching_to_n_grams_late_drafts_from_all_that_was_generated_before(bare_engine):
    """Six rows at once: half of the samples, then the others."""

    class LateNgrams(CyclingSelector):
        def select(self, batch_size, context_tokens, referenced_rows=0):
            return self.strategies[len(self.recorded) >= 59]

    selector = bare_engine.strategy_selector = LateNgrams(["off", "ngram_8_1_9"])
    bare_engine.generate(make_prompts(1), GREEDY, num_samples=12)
    assert {str(s.strategy) for s in selector.recorded[59:]} == {"ngram_8_1_9"}
    late = selector.recorded[59:]
    rows = sum(stats.batch_size for stats in late)
    assert sum(stats.num_tokens for stats in late) > 5 * rows


def test_a_resumed_engine_drafts_as_the_one_that_went_on(bare_engine, folders, target_model):
    sampling = SamplingParams(max_tokens=40)
    prompts = make_prompts(4)
    bare_engine.generate(prompts, sampling, num_samples=2, seed=1)
    state = bare_engine.state_dict()
    resumed = TorchEngine(strategy="ngram_8_1_9", max_batch_size=6, device="cpu")
    resumed.start(str(folders[0]))
    resumed.load_state_dict(state)
    resumed.load_policy(target_model.named_parameters(), version=0)
    fresh = TorchEngine(strategy="ngram_8_1_9", max_batch_size=6, device="cpu")
    fresh.start(str(folders[0]))
    fresh.load_policy(target_model.named_parameters(), version=0)
    went_on, after_resume, without = (
        one.generate(prompts, sampling, num_samples=2, seed=1)
        for one in (bare_engine, resumed, fresh)
    )
    assert [r.accept_lengths for r in after_resume] == [r.accept_lengths for r in went_on]
    assert [r.accept_lengths for r in without] != [r.accept_lengths for r in went_on]
    assert [r.tokens for r in without] == [r.tokens for r in went_on]


def test_closing_forgets_the_responses(bare_engine):
    bare_engine.generate(make_prompts(2), GREEDY)
    assert bare_engine._responses.num_tokens == 120
    bare_engine.close()
    assert bare_engine._responses.num_tokens == 0


def test_learned_strategies_stay_refused_without_a_drafter(bare_engine):
    bare_engine.strategy_selector = FixedStrategy("4_2_8")
    with pytest.raises(ValueError, match=r"4_2_8 needs a drafter.*'ngram_4_2_8'"):
        bare_engine.generate(make_prompts(1), GREEDY)
    bare_engine.strategy_selector = FixedStrategy(f"ngram_2_{VOCAB_SIZE + 1}_9")
    with pytest.raises(ValueError, match="topk 41 is larger than the vocabulary"):
        bare_engine.generate(make_prompts(1), GREEDY)


def test_profiled_n_gram_steps_verify_full_trees_and_leave_nothing_behind(bare_engine, monkeypatch):
    sizes = []
    draft = NgramDrafting.draft

    def measured(self, rows, strategy):
        tree = draft(self, rows, strategy)
        sizes.append((tree.num_nodes, tree.depth))
        return tree

    monkeypatch.setattr(NgramDrafting, "draft", measured)
    strategy = DraftStrategy.parse("ngram_3_2_8")

    class Asking(CyclingSelector):
        asked = False
        costs: list[float] = []  # noqa: RUF012

        def cost_queries(self, max_batch_size, max_context):
            asked, self.asked = self.asked, True
            return [] if asked else [
                CostQuery(strategy=strategy, batch_size=4, context_tokens=20)
            ]  # fmt: skip

        def record_cost(self, query, seconds):
            self.costs.append(seconds)

    bare_engine.strategy_selector = Asking(["off"])
    bare_engine.generate(make_prompts(1), GREEDY)
    assert set(sizes) == {(8, 3)}
    assert len(Asking.costs) == 1
    assert bare_engine._responses.num_tokens == 60  # of the real call alone
