"""Hidden states of a target against transformers' own, one unpadded sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fastrl.rollout.drafters.states import inputs_of_layers
from fastrl.rollout.drafters.target_features import micro_batches, sequence_features
from fastrl.types import TokenSequence
from tests.rollout.tiny_models import FAMILIES, VOCAB_SIZE, make_target

LENGTHS = (9, 3, 30, 17, 1, 22)


def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        TokenSequence(
            tokens_T=torch.randint(VOCAB_SIZE, (length,), generator=generator),
            num_prompt_tokens=length // 2,
        )
        for length in LENGTHS
    ]


def naive_hidden(target: PreTrainedModel, tokens_T: torch.Tensor) -> torch.Tensor:
    """What the LM head reads, found by running it: hidden states whose logits are the model's."""
    with torch.no_grad():
        output = target(tokens_T.unsqueeze(0), output_hidden_states=True, use_cache=False)
        hidden_TD = output.hidden_states[-1][0]
        head = target.get_output_embeddings()
        torch.testing.assert_close(head(hidden_TD), output.logits[0])
    return hidden_TD


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_features_equal_an_unpadded_forward_of_each_sequence(
    family: str, max_tokens: int, tmp_path: Path
) -> None:
    target = make_target(tmp_path, family)
    given = sequences()
    features = sequence_features(target, given, max_tokens=max_tokens)
    assert [f.num_prompt_tokens for f in features] == [s.num_prompt_tokens for s in given]
    for sequence, one in zip(given, features, strict=True):
        assert torch.equal(one.tokens_T, sequence.tokens_T)
        expected = naive_hidden(target, sequence.tokens_T)
        torch.testing.assert_close(one.hidden_TD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_of_layers_come_with_them(family: str, tmp_path: Path) -> None:
    target, inputs = make_target(tmp_path, family), []
    layers = target.base_model.get_submodule("layers")
    features = sequence_features(target, sequences(), max_tokens=40, layers=(1, 0))
    for layer in (1, 0):
        layers[layer].register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    for sequence, one in zip(sequences(), features, strict=True):
        inputs.clear()
        hidden_TD = naive_hidden(target, sequence.tokens_T)
        second_TD, first_TD = inputs[1][0], inputs[0][0]  # the first layer runs first
        expected = torch.cat((hidden_TD, second_TD, first_TD), dim=-1)
        torch.testing.assert_close(one.hidden_TD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_of_layers_are_transformers_hidden_states_to_the_bit(
    family: str, tmp_path: Path
) -> None:
    target, layers = make_target(tmp_path, family).base_model, (2, 0, 1)
    tokens_BT = torch.arange(24).view(2, 12)
    expected = target(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
    with inputs_of_layers(target, layers) as inputs:
        output = target(input_ids=tokens_BT, use_cache=False)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    for layer in layers:
        assert torch.equal(inputs[layer], expected.hidden_states[layer])
    target(input_ids=tokens_BT + 1, use_cache=False)
    assert torch.equal(inputs[0], expected.hidden_states[0])  # no longer looked at


def test_the_same_sequences_have_the_same_features_to_the_bit(tmp_path: Path) -> None:
    target = make_target(tmp_path)
    first, second = (sequence_features(target, sequences(), max_tokens=40) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.hidden_TD, other.hidden_TD)


def test_forwards_take_all_sequences_once_and_keep_their_bound() -> None:
    batches = micro_batches(LENGTHS, 40)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(LENGTHS[index] for index in batch) <= 40
    assert len(batches) < len(LENGTHS)
    assert micro_batches([50, 2], 40) == [[0], [1]]
