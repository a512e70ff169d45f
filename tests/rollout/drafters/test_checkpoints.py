"""Published EAGLE drafters: read bit for bit, whatever the layout, and written as SGLang's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from fastrl.rollout.drafters.checkpoints import check_sglang_reads, read_checkpoint
from fastrl.rollout.drafters.eagle import EagleDrafter
from tests.rollout.drafters.published_eagle import (
    SIZE,
    VOCAB_SIZE,
    publish,
    published_weights,
    reference_outputs,
)

Weights = dict[str, Tensor]


def own(weights: Weights) -> Weights:
    """As a drafter has them: float32, a bias, no copies of what is the target's."""
    taken = {name.removeprefix("model."): weight.float() for name, weight in weights.items()}
    taken.setdefault("fc.bias", torch.zeros(SIZE))
    return {
        name: weight
        for name, weight in taken.items()
        if name not in ("embed_tokens.weight", "lm_head.weight")
        and not name.endswith("rotary_emb.inv_freq")
    }


def assert_same_bits(given: Weights, expected: Weights) -> None:
    assert given.keys() == expected.keys()
    for name, weight in given.items():
        assert weight.dtype == expected[name].dtype
        assert weight.view(torch.uint8).equal(expected[name].view(torch.uint8)), name


def outputs(drafter: EagleDrafter) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings, hidden = torch.randn(2, 7, SIZE, generator=generator)
    drafter.double()
    with torch.no_grad():
        predicted = drafter(
            embeddings.double()[None],
            hidden.double()[None],
            torch.arange(7)[None],
            torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(),
        )
    return embeddings, hidden, predicted[0]


LAYOUTS: dict[str, tuple[bool, str, str, dict[str, Any]]] = {
    # has a bias, file, prefix of names, changes of the configuration
    "safeailab": (True, "pytorch_model.bin", "", {}),
    "safeailab_says_bias": (True, "pytorch_model.bin", "", {"bias": True}),
    "safeailab_without_bias": (False, "pytorch_model.bin", "", {"bias": False}),
    "safeailab_unsaid": (False, "pytorch_model.bin", "", {}),
    "safetensors": (True, "model.safetensors", "", {}),
    "nameless": (True, "pytorch_model.bin", "", {"architectures": None, "model_type": None}),
    "prefixed": (True, "model.safetensors", "model.", {}),
    "tied": (True, "pytorch_model.bin", "", {"tie_word_embeddings": True}),
    "sglang_bin": (True, "pytorch_model.bin", "", {"architectures": ["LlamaForCausalLMEagle"]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_layout_is_read_bit_for_bit_and_written_as_sglangs(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    has_bias, file, prefix, changes = LAYOUTS[layout]
    published = published_weights(bias=has_bias, dtype=dtype)
    named = {prefix + name: weight for name, weight in published.items()}
    publish(tmp_path / "published", named, file=file, **changes)
    target = LlamaConfig(hidden_size=SIZE, vocab_size=VOCAB_SIZE, num_attention_heads=4)
    drafter = EagleDrafter.from_pretrained(tmp_path / "published", target)
    assert_same_bits(dict(drafter.named_weights()), own(published))
    drafter.save_pretrained(tmp_path / "exported")
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert_same_bits(exported, own(published))
    for name, weight in published.items():
        if name in exported:  # nothing was lost on the way to float32
            assert_same_bits({name: exported[name].to(dtype)}, {name: weight})
    check_sglang_reads(tmp_path / "exported")
    again = EagleDrafter.from_pretrained(tmp_path / "exported", target)
    again.save_pretrained(tmp_path / "again")
    for part in ("config.json", "model.safetensors"):
        files = [(tmp_path / folder / part).read_bytes() for folder in ("exported", "again")]
        assert files[0] == files[1]


@pytest.mark.parametrize("has_bias", [True, False])
def test_an_imported_drafter_computes_what_eagle_defines(tmp_path: Path, has_bias: bool) -> None:
    """With the file's rotary base and norm, and an attention without an input norm before it."""
    published = published_weights(bias=has_bias)
    publish(tmp_path, published, bias=has_bias)
    embeddings, hidden, predicted = outputs(EagleDrafter.from_pretrained(tmp_path))
    expected = reference_outputs(published, embeddings, hidden)
    # transformers computes the rotation and the norm in float32.
    torch.testing.assert_close(predicted, expected, atol=2e-5, rtol=2e-5)


def test_weights_that_follow_from_others_are_left_out(tmp_path: Path) -> None:
    published = published_weights(bias=True)
    further = {
        "lm_head.weight": torch.ones(3, SIZE),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    publish(tmp_path, published | further)
    assert_same_bits(
        read_checkpoint(tmp_path).weights,
        {name: weight for name, weight in published.items() if name != "embed_tokens.weight"},
    )


def test_what_sglang_would_misread_is_not_written(tmp_path: Path) -> None:
    """SGLang takes 'bias' for the attention's, and fails on tied embeddings; the rest stays."""
    publish(
        tmp_path / "published", published_weights(bias=True), bias=True, tie_word_embeddings=True
    )
    EagleDrafter.from_pretrained(tmp_path / "published").save_pretrained(tmp_path / "exported")
    settings = json.loads((tmp_path / "exported/config.json").read_text())
    assert "bias" not in settings
    assert not settings.get("tie_word_embeddings")
    assert settings["architectures"] == ["LlamaForCausalLMEagle"]
    assert settings["rope_parameters"]["rope_theta"] == 77.0
    assert settings["rms_norm_eps"] == 0.02


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return {name.replace(old, new): weight for name, weight in weights.items()}


def second_layer(weights: Weights) -> Weights:
    return weights | renamed(weights, "layers.0", "layers.1")


def without(weights: Weights, *parts: str) -> Weights:
    return {n: w for n, w in weights.items() if not any(part in n for part in parts)}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a policy": (lambda w: without(w, "fc."), {}, "has no fc.weight.*is it a drafter"),
    "two layers": (second_layer, {"num_hidden_layers": 2}, r"has the layers \['0', '1'\]"),
    "two layers said": (dict, {"num_hidden_layers": 2}, "num_hidden_layers 2 in config.json"),
    "no layer": (lambda w: without(w, "layers"), {}, r"has the layers \[\], expected"),
    "EAGLE-3 by name": (dict, {"architectures": ["LlamaForCausalLMEagle3"]}, "an EAGLE-3 drafter"),
    "EAGLE-3 by layer": (
        lambda w: renamed(w, "layers.0", "midlayer"), {}, "EAGLE-3 drafter .*midlayer",
    ),
    "EAGLE-3 by map": (
        lambda w: w | {"d2t": torch.zeros(3)}, {}, "an EAGLE-3 drafter .*d2t",
    ),
    "EAGLE-3 by fc": (
        lambda w: w | {"fc.weight": torch.zeros(SIZE, 3 * SIZE)}, {}, "over three hidden states",
    ),
    "another fc": (
        lambda w: w | {"fc.weight": torch.zeros(SIZE, SIZE)}, {},
        r"fc.weight of shape \(16, 16\) and hidden_size 16",
    ),
    "another size": (dict, {"hidden_size": 8}, "hidden_size 8 in config.json"),
    "attention biases": (
        lambda w: w | {"layers.0.self_attn.q_proj.bias": torch.zeros(SIZE)}, {},
        r"has biases in its layer \(layers.0.self_attn.q_proj.bias\)",
    ),
    "another family": (dict, {"model_type": "qwen2"}, "model_type 'qwen2', expected 'llama'"),
    "another architecture": (
        dict, {"architectures": ["GPT2LMHeadModel"]}, r"architectures \['GPT2LMHeadModel'\]",
    ),
    "a bias that is said": (lambda w: without(w, "fc.bias"), {"bias": True}, "has no fc.bias in"),
    "an input norm": (
        lambda w: w | {"layers.0.input_layernorm.weight": torch.ones(SIZE)}, {},
        r"unknown \['layers.0.input_layernorm.weight'\]",
    ),
    "a missing weight": (
        lambda w: without(w, "down_proj"), {}, r"missing \['layers.0.mlp.down_proj.weight'\]",
    ),
    "two of a name": (
        lambda w: w | {"model.fc.bias": torch.zeros(SIZE)}, {}, "both fc.bias and model.fc.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_eagle_drafter_is_refused_with_the_reason(tmp_path: Path, what: str) -> None:
    change, changes, message = REFUSED[what]
    publish(tmp_path, change(published_weights(bias=True)), **changes)
    with pytest.raises(ValueError, match=message):
        EagleDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_file_is_named(tmp_path: Path, file: str, share: float) -> None:
    publish(tmp_path, published_weights(bias=True), file=file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{file} cannot be read as weights .*is it complete"):
        EagleDrafter.from_pretrained(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    publish(tmp_path, published_weights(bias=True))
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds list, expected tensors by name"):
        EagleDrafter.from_pretrained(tmp_path)


def test_weights_in_several_files_are_named(tmp_path: Path) -> None:
    publish(tmp_path, published_weights(bias=True))
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ValueError, match="in several files"):
        EagleDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("tied", "'tie_word_embeddings' in config.json, on which SGLang fails"),
        ("safeailab", "LlamaForCausalLM'] instead of"),
        ("safeailab_says_bias", "takes for the attention's"),
        ("safeailab_unsaid", "no fc.bias, which SGLang would leave random"),
        ("prefixed", "names that start with 'model.'"),
    ],
)
def test_what_sglang_would_read_otherwise_is_told(tmp_path: Path, layout: str, fault: str) -> None:
    has_bias, file, prefix, changes = LAYOUTS[layout]
    weights = {prefix + name: w for name, w in published_weights(bias=has_bias).items()}
    publish(tmp_path, weights, file=file, **changes)
    with pytest.raises(ValueError, match=r"export_drafter\.py --drafter") as error:
        check_sglang_reads(tmp_path)
    assert fault in str(error.value)


def test_sglangs_own_layout_is_left_alone(tmp_path: Path) -> None:
    """Published with copies of what it shares with the target."""
    weights = published_weights(bias=True) | {"lm_head.weight": torch.zeros(VOCAB_SIZE, SIZE)}
    publish(tmp_path, weights, architectures=["LlamaForCausalLMEagle"])
    check_sglang_reads(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    check_sglang_reads(tmp_path)
