"""Held-out figures against a token-by-token loop, and against what an engine emits."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.rollout.drafters.agreement import agreement_by_depth
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.held_out import (
    KS,
    MAX_DEPTH,
    PLACES,
    HeldOutRow,
    HeldOutSums,
    PlaceFigures,
    place_figures,
)
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.rollout.drafters.target_features import sequence_features
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import Rollout, SamplingParams, SequenceFeatures, TokenSequence
from tests.rollout.drafters.conftest import VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains
from tests.rollout.tiny_models import make_prompts, make_target

SIZES = (9, 3), (4, 1), (12, 7), (6, 5), (5, 2), (30, 8)
TASKS = ("sum", "sum", "word", "word", "sum", "word")


def row_of(sequences: list[SequenceFeatures], tasks: tuple[str, ...]) -> HeldOutRow:
    packed = fold_segments(pack_sequences(sequences, max_pairs=1000))
    return HeldOutRow(
        packed=packed,
        sequences=tuple(
            TokenSequence(tokens_T=one.tokens_T, num_prompt_tokens=one.num_prompt_tokens)
            for one in sequences
        ),
        tasks=tasks,
    )


def naive_ranks(
    drafter: EagleDrafter, weights: tuple[Tensor, Tensor], features: SequenceFeatures
) -> list[list[int]]:
    """By place from 1 on, by depth as far as the response goes, by sorting the vocabulary."""
    asked = dataclasses.replace(features, num_prompt_tokens=features.num_prompt_tokens + 1)
    ranks: list[list[int]] = [[] for _ in range(len(features) - features.num_prompt_tokens - 1)]
    for depth in range(1, MAX_DEPTH + 1):
        with torch.no_grad():
            chains = naive_chains(drafter, weights[0], [asked], depth)
        for chain, (output, _) in enumerate(chains):
            logits = (weights[1] @ output).tolist()
            guesses = sorted(range(VOCAB_SIZE), key=lambda token: -logits[token])
            drafted = features.num_prompt_tokens + chain + depth
            ranks[chain].append(guesses.index(int(features.tokens_T[drafted])))
    return ranks


def naive_length(ranks: list[int], k: int, num_left: int) -> int:
    """Tokens that a step emits: drafts up to the first wrong one, and the target's own."""
    emitted = 0
    for rank in ranks:
        if rank >= k:
            break
        emitted += 1
    return emitted if emitted == num_left else emitted + 1


def test_figures_of_every_place_are_those_of_a_token_by_token_loop(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Responses of different lengths, one of a single token, in one folded row."""
    sequences = random_sequences(*SIZES)
    row = row_of(sequences, TASKS)
    assert len(row.packed.segment_BT) > 1
    places, _ = place_figures(drafter, *shared_weights, row)
    found = {
        (sequence, place): (ranks[: sum(drafted)], lengths)
        for sequence, place, ranks, drafted, lengths in zip(
            places.sequence_M.tolist(),
            places.place_M.tolist(),
            places.ranks_MN.tolist(),
            places.is_drafted_MN.tolist(),
            places.accept_lengths_MK.tolist(),
            strict=True,
        )
    }
    expected = {}
    for sequence, features in enumerate(sequences):
        naive = naive_ranks(drafter, shared_weights, features)
        for place, ranks in enumerate(naive, start=1):
            num_left = len(naive) + 1 - place
            lengths = [naive_length(ranks, k, num_left) for k in KS]
            expected[sequence, place] = (ranks, lengths)
    assert found == expected
    assert (
        len({lengths[2] for _, lengths in found.values()}) > 2
    )  # else nothing was put to the test


def test_agreement_is_that_of_the_packed_row(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    row = row_of(random_sequences(*SIZES), TASKS)
    _, agreements = place_figures(drafter, *shared_weights, row)
    assert agreements == agreement_by_depth(
        drafter, *shared_weights, row.packed, max_depth=MAX_DEPTH
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Beside it in `drafter` one that is often right: it predicts that the hidden state stays."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_target(folder / "target")
    drafter = EagleDrafter.for_target(target.config, seed=0)
    size = target.config.hidden_size
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim == 2:
                weight.mul_(0.1)
        drafter.fc.weight[:, size:] += torch.eye(size)
    drafter.save_pretrained(folder / "drafter")
    target.name_or_path = str(folder / "target")
    return target


def responses(target: PreTrainedModel, strategy: str, temperature: float) -> list[Rollout]:
    folder = Path(target.name_or_path)
    engine = TorchEngine(drafter_path=str(folder.parent / "drafter"), strategy=strategy)
    engine.start(str(folder))
    engine.load_policy(target.named_parameters(), 0)
    sampling = SamplingParams(max_tokens=40, temperature=temperature)
    rollouts = engine.generate(make_prompts(4), sampling, num_samples=3)
    engine.close()
    return rollouts


def lengths_of(
    target: PreTrainedModel, rollouts: list[Rollout], k: int
) -> dict[tuple[int, int], int]:
    """Accept length by response and place."""
    sequences = [
        TokenSequence(
            tokens_T=torch.tensor(one.prompt.tokens + one.tokens),
            num_prompt_tokens=len(one.prompt.tokens),
        )
        for one in rollouts
    ]
    features = sequence_features(target, sequences, max_tokens=4096)
    drafter = load_drafter(Path(target.name_or_path).parent / "drafter", target.config)
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    row = row_of(features, ("any",) * len(rollouts))
    places, _ = place_figures(drafter, embedding.weight, lm_head.weight, row)
    at = zip(places.sequence_M.tolist(), places.place_M.tolist(), strict=True)
    lengths = places.accept_lengths_MK[:, KS.index(k)].tolist()
    return dict(zip(at, lengths, strict=True))


def emitted_by(rollouts: list[Rollout]) -> dict[tuple[int, int], int]:
    """Tokens of each decode step by response and the place of its first."""
    emitted = {}
    for number, rollout in enumerate(rollouts):
        place = 1
        for num_tokens in rollout.accept_lengths:
            emitted[number, place] = num_tokens
            place += num_tokens
    assert sum(emitted.values()) > len(emitted) + 20  # else nothing is put to the test
    return emitted


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_accept_length_is_what_an_engine_emits_with_a_chain(
    target: PreTrainedModel, temperature: float
) -> None:
    rollouts = responses(target, f"{MAX_DEPTH}_1_{MAX_DEPTH + 1}", temperature)
    emitted, lengths = emitted_by(rollouts), lengths_of(target, rollouts, k=1)
    assert emitted == {at: lengths[at] for at in emitted}


def test_an_engine_emits_no_more_with_a_tree_of_that_width(target: PreTrainedModel) -> None:
    rollouts = responses(target, "3_2_7", 0.3)
    lengths = lengths_of(target, rollouts, k=2)
    assert all(num_tokens <= lengths[at] for at, num_tokens in emitted_by(rollouts).items())


# ---- sums


def counted(
    sums: HeldOutSums, drafter: EagleDrafter, weights: tuple[Tensor, Tensor], row: HeldOutRow
) -> PlaceFigures:
    places, agreements = place_figures(drafter, *weights, row)
    sums.add(places, agreements, row.tasks)
    return places


def test_means_are_over_the_places_of_all_rows_of_a_task_and_of_a_range(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    sequences = random_sequences(*SIZES)
    sums = HeldOutSums(("sum", "unseen", "word"), torch.device("cpu"))
    lengths: dict[str, list[int]] = defaultdict(list)
    hits: dict[str, list[bool]] = defaultdict(list)
    for members in (slice(0, 4), slice(4, 6)):
        row = row_of(sequences[members], TASKS[members])
        places = counted(sums, drafter, shared_weights, row)
        for sequence, place, ranks, drafted, by_k in zip(
            places.sequence_M.tolist(),
            places.place_M.tolist(),
            places.ranks_MN.tolist(),
            places.is_drafted_MN.tolist(),
            places.accept_lengths_MK.tolist(),
            strict=True,
        ):
            for k, length in zip(KS, by_k, strict=True):
                lengths[f"top{k}"].append(length)
                for depth in range(sum(drafted)):
                    hits[f"top{k}_accuracy_depth_{depth + 1}"].append(ranks[depth] < k)
            lengths[f"task_{row.tasks[sequence]}"].append(by_k[0])
            lengths[f"place_{'1-15' if place <= 15 else '16-63'}"].append(by_k[0])
    expected = {f"accept_length_{name}": sum(of) / len(of) for name, of in lengths.items()}
    expected |= {name: sum(of) / len(of) for name, of in hits.items()}
    agreements = agreement_by_depth(
        drafter, *shared_weights, row_of(sequences, TASKS).packed, max_depth=MAX_DEPTH
    )
    for depth, agreement in enumerate(agreements, start=1):
        expected[f"loss_depth_{depth}"] = agreement.cross_entropy
        expected[f"acceptance_depth_{depth}"] = agreement.top1_acceptance
    assert sums.figures() == pytest.approx(expected, rel=1e-5)


def test_sums_of_two_ranks_are_those_of_both_their_rows(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """The second has responses of one task alone."""
    sequences = random_sequences(*SIZES)
    whole, first, second = (HeldOutSums(("sum", "word"), torch.device("cpu")) for _ in range(3))
    for rank, members in ((first, slice(0, 5)), (second, slice(5, 6))):
        row = row_of(sequences[members], TASKS[members])
        counted(rank, drafter, shared_weights, row)
        counted(whole, drafter, shared_weights, row)
    of_second: list[Tensor] = []

    def keep(sums: Tensor) -> Tensor:
        of_second.append(sums)
        return sums

    second.reduce(keep)
    first.reduce(lambda sums: sums + of_second[0])
    assert first.figures() == pytest.approx(whole.figures(), rel=1e-12)


def test_ranges_of_places_meet_without_a_gap() -> None:
    bounds = list(PLACES.values())
    assert bounds[0][0] == 1
    for (_, last), (first, _) in itertools.pairwise(bounds):
        assert first == last + 1
