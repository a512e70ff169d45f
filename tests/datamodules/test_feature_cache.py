"""Shards come back as they were, or not at all; the bound holds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fastrl.datamodules.feature_cache import FeatureCache
from fastrl.types import SequenceFeatures

IDENTITY = {"target": "a", "prompts": "b"}
HIDDEN_SIZE = 64


def features(seed: int = 0, num_tokens: int = 300) -> list[SequenceFeatures]:
    generator = torch.Generator().manual_seed(seed)
    return [
        SequenceFeatures(
            tokens_T=torch.randint(50, (length,), generator=generator),
            hidden_TD=torch.randn(length, HIDDEN_SIZE, generator=generator),
            num_prompt_tokens=length // 3,
            rl_step=0,
        )
        for length in (num_tokens, 5, num_tokens // 2)
    ]


def assert_same(one: list[SequenceFeatures], other: list[SequenceFeatures]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.tokens_T, b.tokens_T)
        assert torch.equal(a.hidden_TD, b.hidden_TD)
        assert a.num_prompt_tokens == b.num_prompt_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = [
        SequenceFeatures(
            tokens_T=f.tokens_T,
            hidden_TD=f.hidden_TD.to(dtype),
            num_prompt_tokens=f.num_prompt_tokens,
            rl_step=0,
        )
        for f in features()
    ]
    assert FeatureCache(tmp_path, 1.0, IDENTITY).write("train-00000", given)
    shard = FeatureCache(tmp_path, 1.0, IDENTITY).read("train-00000")
    assert shard is not None
    assert shard.features is not None
    assert_same(shard.features, given)
    assert FeatureCache(tmp_path, 1.0, IDENTITY).read("train-00001") is None


def shard_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("place", [0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("bit", [0, 6])
def test_one_flipped_bit_anywhere_is_detected(
    tmp_path: Path, place: float, bit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the header's length, in the header, in the numbers."""
    cache = FeatureCache(tmp_path, 1.0, IDENTITY)
    cache.write("train-00000", features())
    path = shard_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert cache.read("train-00000") is None
    assert "made anew" in caplog.text
    assert not path.exists()
    cache.write("train-00000", features())
    shard = cache.read("train-00000")
    assert shard is not None
    assert shard.features is not None
    assert_same(shard.features, features())


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("is_opened_anew", [False, True])
def test_a_truncated_shard_is_detected(
    tmp_path: Path, share: float, is_opened_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path, 1.0, IDENTITY)
    cache.write("train-00000", features())
    path = shard_file(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with caplog.at_level(logging.WARNING):
        if is_opened_anew:
            cache = FeatureCache(tmp_path, 1.0, IDENTITY)
        assert cache.read("train-00000") is None
    assert "truncated or damaged" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("changed", ["target", "prompts", "sampling"])
def test_shards_made_of_something_else_are_dropped_by_name(
    tmp_path: Path, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    FeatureCache(tmp_path, 1.0, IDENTITY).write("train-00007", features())
    with caplog.at_level(logging.WARNING):
        cache = FeatureCache(tmp_path, 1.0, IDENTITY | {changed: "other"})
    assert f"made with another {changed}" in caplog.text
    assert cache.read("train-00007") is None
    assert cache.num_bytes == 0


def test_a_shard_of_something_else_that_appears_later_is_not_used(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1.0, IDENTITY)
    other = FeatureCache(tmp_path, 1.0, IDENTITY | {"target": "other"})
    other.write("train-00000", features(seed=1))
    assert cache.read("train-00000") is None


def test_beyond_the_bound_tokens_alone_are_kept_and_then_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = FeatureCache(tmp_path / "one", 1.0, IDENTITY)
    one.write("train-00000", features())
    bound = one.num_bytes + 3 * 10_000
    cache = FeatureCache(tmp_path / "bounded", bound / 2**30, IDENTITY)
    with caplog.at_level(logging.WARNING):
        kept = [cache.write(f"train-{number:05d}", features(number)) for number in range(12)]
    assert kept[0]
    assert not kept[-1]
    assert cache.num_bytes <= bound
    assert caplog.text.count("is full") == 1
    whole, tokens_only = cache.read("train-00000"), cache.read("train-00001")
    assert whole is not None
    assert whole.features is not None
    assert tokens_only is not None
    assert tokens_only.features is None
    for sequence, expected in zip(tokens_only.sequences, features(1), strict=True):
        assert torch.equal(sequence.tokens_T, expected.tokens_T)
        assert sequence.num_prompt_tokens == expected.num_prompt_tokens


def test_a_write_that_was_cut_off_leaves_nothing_and_strangers_files_stay(tmp_path: Path) -> None:
    (tmp_path / "train-00000.features.safetensors.partial").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"not ours")
    FeatureCache(tmp_path, 1.0, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
