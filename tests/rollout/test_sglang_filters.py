"""Filters in SGLang's terms, by hand-made batches: what is handed on, and what costs nothing.

What SGLang samples with them is told in test_sglang_engine.py and test_sglang_adaptation.py.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.sglang_filters import RowFilter, below_largest_hash
from fastrl.types import SamplingParams


@dataclass
class Info:
    """SGLang's parameters of a batch of two rows, as far as filters go."""

    top_k: tuple[int, int] = (1 << 30, 1 << 30)
    top_p: tuple[float, float] = (1.0, 1.0)
    min_p: tuple[float, float] = (0.0, 0.0)
    temperatures: torch.Tensor = field(default_factory=lambda: torch.tensor([[0.5], [2.0]]))

    def __post_init__(self):
        self.top_ks = torch.tensor(self.top_k, dtype=torch.int32)
        self.top_ps, self.min_ps = torch.tensor(self.top_p), torch.tensor(self.min_p)
        self.need_top_k_sampling = any(one != 1 << 30 for one in self.top_k)
        self.need_top_p_sampling = any(one != 1 for one in self.top_p)
        self.need_min_p_sampling = any(one > 0 for one in self.min_p)
        self.is_all_greedy = all(one <= 1 for one in self.top_k)
        self.is_any_greedy = any(one <= 1 for one in self.top_k)


def noted(info: Info) -> RowFilter:
    requests = [SimpleNamespace(sampling_params=SimpleNamespace(top_k=one)) for one in info.top_k]
    row_filter = RowFilter()
    row_filter.note_requests(info, Info, SimpleNamespace(reqs=requests), 9)
    return row_filter


def sampled(info: Info, logits_RV: torch.Tensor) -> tuple[torch.Tensor, Info]:
    """Logits and parameters as SGLang's sampler gets them."""
    output = SimpleNamespace(next_token_logits=logits_RV.clone())

    def sampler(_, output, info, return_logprob):
        assert return_logprob is True
        return output.next_token_logits, info

    return noted(info).around_sampler(sampler, None, output, info, True)


def verified(info: Info, logits_RV: torch.Tensor, num_nodes: int) -> tuple[torch.Tensor, Info]:
    batch = SimpleNamespace(sampling_info=info, forward_mode=SimpleNamespace(is_idle=lambda: False))
    output = SimpleNamespace(next_token_logits=logits_RV.clone())
    tree = SimpleNamespace(draft_token_num=num_nodes)

    def verify(tree, batch, output, grammar_mask=None):
        return output.next_token_logits, batch.sampling_info

    result = noted(info).around_verification(verify, tree, batch, output)
    assert batch.sampling_info is info
    return result


def some_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 9, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("info", [Info(), Info(top_k=(1, 1)), Info(top_k=(1, 1), top_p=(0.5, 1))])
def test_batches_without_filters_go_as_they_are(info):
    logits_RV = some_logits(2)
    seen_RV, seen_info = sampled(info, logits_RV)
    assert torch.equal(seen_RV, logits_RV)
    assert seen_info is info
    seen_RV, seen_info = verified(info, logits_RV, 1)
    assert torch.equal(seen_RV, logits_RV)
    assert seen_info is info


def test_each_row_has_its_own_filters_which_are_not_applied_again():
    info = Info(top_k=(3, 1 << 30), top_p=(0.9, 0.8), min_p=(0.0, 0.3))
    logits_RV = some_logits(2)
    seen_RV, seen_info = sampled(info, logits_RV)
    assert not seen_info.need_top_k_sampling
    assert not seen_info.need_top_p_sampling
    assert not seen_info.need_min_p_sampling
    assert info.need_top_k_sampling  # SGLang's own stay
    for row, sampling in enumerate(
        (
            SamplingParams(temperature=0.5, top_k=3, top_p=0.9),
            SamplingParams(temperature=2.0, top_p=0.8, min_p=0.3),
        )
    ):
        ours = (seen_RV[row] / sampling.temperature).log_softmax(-1)
        torch.testing.assert_close(ours, log_distribution(logits_RV[row], sampling))


def test_a_greedy_row_among_others_keeps_its_first_best_token():
    logits_RV = some_logits(2)
    logits_RV[0, 3:5] = 9.0
    seen_RV, _ = sampled(Info(top_k=(1, 4)), logits_RV)
    assert seen_RV[0].isfinite().nonzero().flatten().tolist() == [3]
    assert seen_RV[1].isfinite().sum() == 4


def test_what_seeded_noise_is_made_of_never_makes_it_infinite():
    """SGLang 0.5.17's noise, of the largest hash: NaN of a token without probability, which argmax
    takes for the largest number."""

    def drawn(hash_RV) -> int:
        noise = hash_RV.double() / (2**32 - 1)
        noise.log_().clamp_(min=torch.finfo(noise.dtype).min).neg_()
        noise.log_().neg_()
        logprobs = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]], dtype=torch.float64)
        return int((noise + logprobs).argmax())

    hash_RV = torch.tensor([[2**31, 2**30, 2**32 - 1]]).to(torch.uint32)
    assert drawn(hash_RV) == 2
    assert drawn(below_largest_hash(hash_RV)) == 0
    assert below_largest_hash(hash_RV)[0, :2].tolist() == [2**31, 2**30]
