"""Drafters written for SGLang: published ones, and those that a run has trained."""

import json
from pathlib import Path

import pytest
import torch
from export_drafter import Export, export, parse
from safetensors.torch import load_file
from transformers import LlamaConfig

from fastrl.rollout.drafters.checkpoints import check_sglang_reads
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.vocabulary import TOKEN_MAP_FILE, check_same_vocabulary
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


TARGET = LlamaConfig(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = (1, 2, 6, 9)


@pytest.mark.parametrize("is_trimmed", [False, True])
@pytest.mark.parametrize("kind", [EagleDrafter, Eagle3Drafter])
def test_every_kind_is_written_with_its_vocabulary_and_a_runs_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[EagleDrafter], is_trimmed: bool
) -> None:
    """An EAGLE-3 drafter as SafeAILab publishes it, the layers that it reads left to the target."""
    drafter = kind.for_target(TARGET, seed=0, token_ids=TOKENS if is_trimmed else None)
    drafter.save_pretrained(tmp_path / "drafter")
    settings = json.loads((tmp_path / "drafter" / "config.json").read_text())
    settings["architectures"] = ["LlamaForCausalLM"]
    settings.pop("eagle_config", None)
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model").mkdir()
    TARGET.save_pretrained(tmp_path / "model")
    trained = {name: weight.detach() + 1 for name, weight in drafter.named_weights()}
    state = {"drafter": trained, **drafter.what_it_reads()}
    torch.save({"callbacks": {"DrafterTraining{}": state}}, tmp_path / "run.ckpt")
    options = {"drafter": str(tmp_path / "drafter"), "model": str(tmp_path / "model")}
    export(Export(**options, output=tmp_path / "folder"))
    export(Export(**options, output=tmp_path / "run", ckpt=str(tmp_path / "run.ckpt")))
    check_sglang_reads(tmp_path / "folder")
    for name, expected in (("folder", dict(drafter.named_weights())), ("run", trained)):
        written = load_drafter(tmp_path / name, TARGET)
        assert type(written) is kind
        check_same_vocabulary(written.token_map_F, drafter.token_map_F)
        assert written.feature_layers == drafter.feature_layers
        for weight_name, weight in written.named_weights():
            assert torch.equal(weight, expected[weight_name]), weight_name
    shown = capsys.readouterr().out
    assert ("EAGLE3" in shown) is (kind is Eagle3Drafter)
    has_list = kind is EagleDrafter and is_trimmed
    assert ("speculative_token_map" in shown) is has_list
    if has_list:
        token_map = torch.load(tmp_path / "folder" / TOKEN_MAP_FILE, weights_only=True)
        assert token_map == list(TOKENS)
    other = state | {"token_map": torch.tensor([0, 3, 4, 5])}
    torch.save({"callbacks": {"DrafterTraining{}": other}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="or others"):
        export(Export(**options, output=tmp_path / "no", ckpt=str(tmp_path / "other.ckpt")))
