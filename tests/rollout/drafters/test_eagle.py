"""The EAGLE drafter's checkpoints: what they hold and refuse, and what loading leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter


def target_config(**changes: Any) -> LlamaConfig:
    dimensions = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    return LlamaConfig(**(dimensions | changes))


def outputs(drafter: EagleDrafter) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    embeddings, hidden = torch.randn(2, 1, 5, 16, generator=generator)
    with torch.no_grad():
        return drafter(embeddings, hidden, torch.arange(5)[None])


def weights(drafter: EagleDrafter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in drafter.named_weights()}


def test_a_saved_drafter_loads_with_the_same_outputs(tmp_path: Path) -> None:
    drafter = EagleDrafter.for_target(target_config(), seed=1)
    drafter.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path, target=target_config())
    assert torch.equal(outputs(loaded), outputs(drafter))
    assert not torch.equal(
        outputs(EagleDrafter.for_target(target_config(), seed=2)), outputs(drafter)
    )


def test_rotary_base_and_norm_of_the_target_survive_a_round_trip(tmp_path: Path) -> None:
    target = target_config(
        rope_parameters={"rope_type": "default", "rope_theta": 77.0}, rms_norm_eps=0.3
    )
    drafter = EagleDrafter.for_target(target, seed=1)
    drafter.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path, target=target)
    assert torch.equal(outputs(loaded), outputs(drafter))
    assert loaded.config.rope_parameters["rope_theta"] == 77.0
    assert loaded.config.rms_norm_eps == 0.3


def test_a_checkpoint_holds_trainable_tensors_only(tmp_path: Path) -> None:
    """No embedding, no LM head: one layer of d² size, whatever the vocabulary."""
    EagleDrafter.for_target(target_config(vocab_size=5003), seed=1).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("embed" in name or "lm_head" in name for name in saved)
    assert all(5003 not in tensor.shape for tensor in saved.values())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLMEagle"
    ]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_shared_weights_in_a_checkpoint_are_skipped(prefix: str) -> None:
    """Published drafters carry copies of the target's embedding and LM head."""
    drafter = EagleDrafter.for_target(target_config(), seed=1)
    given = weights(EagleDrafter.for_target(target_config(), seed=2))
    shared = {f"{prefix}embed_tokens.weight": torch.zeros(11, 16), "lm_head.weight": torch.ones(1)}
    drafter.load_weights((given | shared).items(), source="test")
    assert weights(drafter).keys() == given.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in weights(drafter).items())


def test_loading_copies_so_that_the_source_may_change_afterwards() -> None:
    source = EagleDrafter.for_target(target_config(), seed=2)
    drafter = EagleDrafter.for_target(target_config(), seed=1)
    drafter.load_weights(source.named_weights(), source="test")
    served = weights(drafter)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, served[name]) for name, tensor in drafter.named_weights())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"of pub 3 do not fit: missing \['fc.bias'\], unknown \[\]"),
        ("unknown", r"missing \[\], unknown \['layers.1.mlp.weight'\]"),
        ("misshapen", r"misshapen \['fc.weight \(16, 3\) instead of \(16, 32\)'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(
    change: str, message: str
) -> None:
    drafter = EagleDrafter.for_target(target_config(), seed=1)
    before = weights(drafter)
    given = weights(EagleDrafter.for_target(target_config(), seed=2))
    if change == "missing":
        del given["fc.bias"]
    elif change == "unknown":
        given["layers.1.mlp.weight"] = torch.zeros(2)
    else:
        given["fc.weight"] = torch.zeros(16, 3)
    with pytest.raises(ValueError, match=message):
        drafter.load_weights(given.items(), source="pub 3")
    assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.named_weights())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"has hidden_size 16, but the policy's is 32"),
        ({"vocab_size": 12}, r"has vocab_size 11, but the policy's is 12"),
    ],
)
def test_a_drafter_of_another_target_is_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    EagleDrafter.for_target(target_config(), seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        EagleDrafter.from_pretrained(tmp_path, target=target_config(**changes))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """A policy's folder given as the drafter's is the likely mistake."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no fc\.weight.*is it a drafter"):
        EagleDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    EagleDrafter.for_target(target_config(), seed=1).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        EagleDrafter.from_pretrained(tmp_path)


def test_initialization_follows_its_seed_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = (weights(EagleDrafter.for_target(target_config(), seed=4)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
