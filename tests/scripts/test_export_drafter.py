"""Drafters written for SGLang: published ones, and those that a run has trained."""

from pathlib import Path

import pytest
import torch
from export_drafter import Export, export, parse
from safetensors.torch import load_file

from fastrl.rollout.drafters.checkpoints import check_sglang_reads
from fastrl.rollout.drafters.eagle import EagleDrafter
from tests.rollout.drafters.published_eagle import publish, published_weights


def exported(folder: Path) -> dict[str, torch.Tensor]:
    check_sglang_reads(folder)
    return load_file(folder / "model.safetensors")


def test_a_published_drafter_is_written_for_sglang(tmp_path: Path) -> None:
    published = published_weights(bias=False)
    publish(tmp_path / "published", published, bias=False)
    arguments = ["--drafter", str(tmp_path / "published"), "--output", str(tmp_path / "exported")]
    export(parse(arguments))
    written = exported(tmp_path / "exported")
    assert written["fc.weight"].equal(published["fc.weight"].float())
    assert written["fc.bias"].count_nonzero() == 0


def test_a_published_drafter_keeps_its_bits_in_its_own_dtype(tmp_path: Path) -> None:
    published = published_weights(bias=True)
    publish(tmp_path / "published", published)
    export(
        Export(drafter=str(tmp_path / "published"), output=tmp_path / "exported", dtype="float16")
    )
    written = exported(tmp_path / "exported")
    assert written.keys() == published.keys() - {"embed_tokens.weight"}
    for name, weight in written.items():
        assert weight.dtype == torch.float16
        assert weight.view(torch.int16).equal(published[name].view(torch.int16))


def test_the_weights_of_a_run_take_the_place_of_the_folders(tmp_path: Path) -> None:
    publish(tmp_path / "published", published_weights(bias=True))
    before = EagleDrafter.from_pretrained(tmp_path / "published")
    trained = {name: weight.detach() + 1 for name, weight in before.named_weights()}
    state = {"DrafterTraining{}": {"drafter": trained}, "Timer": {}}
    torch.save({"callbacks": state}, tmp_path / "run.ckpt")
    wanted = Export(
        drafter=str(tmp_path / "published"),
        output=tmp_path / "exported",
        ckpt=str(tmp_path / "run.ckpt"),
    )
    export(wanted)
    written = exported(tmp_path / "exported")
    assert all(weight.equal(written[name]) for name, weight in trained.items())
    with pytest.raises(FileExistsError, match="holds a model already"):
        export(wanted)


def test_a_run_without_a_drafter_is_told(tmp_path: Path) -> None:
    publish(tmp_path / "published", published_weights(bias=True))
    torch.save({"callbacks": {"Timer": {}}}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="has no drafter"):
        export(
            Export(
                drafter=str(tmp_path / "published"),
                output=tmp_path / "exported",
                ckpt=str(tmp_path / "run.ckpt"),
            )
        )
