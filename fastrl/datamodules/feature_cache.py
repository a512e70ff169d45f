"""Feature shards on disk: bounded, whole or not at all, and never another target's.

A shard is a safetensors file: the tokens of some sequences and, while there is room, the target's
hidden states of them. Its metadata hold what the numbers depend on (target, prompts, sampling,
tokenizer, …), their size in bytes and a SHA-256 of them. A file that is damaged, or was made of
anything else, is deleted with a warning that says why, and its owner makes the shard anew. Where
the bound leaves no room for hidden states, the tokens alone are kept: the target's forward is
repeated each time then, what was generated is not.

Leaves out what is in which shard (features.py), and several processes in one folder: each rank has
its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastrl.types import SequenceFeatures, TokenSequence

_SUFFIX = ".features.safetensors"
_IDENTITY, _NUM_BYTES, _DIGEST = "made_of", "num_bytes", "sha256"

_HEADER_BYTES = 4096
"""More than a file's header takes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What a file gave back."""

    sequences: list[TokenSequence]
    features: list[SequenceFeatures] | None
    """None where there was no room for hidden states."""


class FeatureCache:
    """Shards of one run in one folder.

    Args:
        folder: made where it is missing; only files of this cache in it are ever touched.
        max_gib: most that the files take together.
        identity: all that the features are a function of, by name, as short texts.
    """

    def __init__(self, folder: Path, max_gib: float, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._max_bytes = int(max_gib * 2**30)
        self._identity = dict(identity)
        self._said_full = False
        self._checked: dict[Path, tuple[int, int]] = {}
        """Files whose numbers were compared with their SHA-256, as they were then."""
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"*{_SUFFIX}.partial"):
            partial.unlink()
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._drop_unless_ours(path)

    @property
    def num_bytes(self) -> int:
        """That its files take."""
        return sum(path.stat().st_size for path in self.folder.glob(f"*{_SUFFIX}"))

    def read(self, name: str) -> Shard | None:
        """The shard of that name; None where there is none, or was none that could be used.

        Numbers are compared with their SHA-256 when a file is first read, and when it has changed.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            state = path.stat().st_mtime_ns, path.stat().st_size
            is_known = self._checked.get(path) == state
            tensors = _checked_tensors(path, self._identity, with_digest=not is_known)
            self._checked[path] = state
        except _UnusableError as problem:
            _unlink(path, str(problem))
            return None
        return _unpack(tensors)

    def write(self, name: str, features: Sequence[SequenceFeatures]) -> bool:
        """Keep a shard, with hidden states if they fit, in place of what is under its name.

        Returns:
            Whether it is kept, be it without hidden states.
        """
        path = self._path(name)
        path.unlink(missing_ok=True)
        room = self._max_bytes - self.num_bytes
        for with_hidden in (True, False):
            tensors = _pack(features, with_hidden=with_hidden)
            if _size(tensors) + _HEADER_BYTES <= room:
                _save(tensors, path, self._identity)
                return True
            self._say_full(name)
        _log.warning(
            "feature cache %s: not even the tokens of shard %s fit, it is made anew each time; "
            "raise data.cache_gib",
            self.folder,
            name,
        )
        return False

    def fits(self, name: str, features: Sequence[SequenceFeatures]) -> bool:
        """Whether there is room for a shard with its hidden states, in place of what is under its
        name."""
        path = self._path(name)
        replaced = path.stat().st_size if path.is_file() else 0
        size = _size(_pack(features, with_hidden=True)) + _HEADER_BYTES
        return size <= self._max_bytes - self.num_bytes + replaced

    def _say_full(self, name: str) -> None:
        """Once, when hidden states are first left out."""
        if self._said_full:
            return
        self._said_full = True
        _log.warning(
            "feature cache %s is full (%.3g of %.3g GiB): from shard %s on, hidden states are "
            "computed anew whenever they are needed; raise data.cache_gib to keep them",
            self.folder,
            self.num_bytes / 2**30,
            self._max_bytes / 2**30,
            name,
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _drop_unless_ours(self, path: Path) -> None:
        try:
            with _opened(path) as file:
                _check_identity(file.metadata(), self._identity)
        except _UnusableError as problem:
            _unlink(path, str(problem))


class _UnusableError(Exception):
    """Why a file cannot be used."""


def _unlink(path: Path, reason: str) -> None:
    _log.warning("feature cache: %s is deleted and will be made anew: %s", path, reason)
    path.unlink()


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:  # safetensors compares header and file size
        raise _UnusableError(f"it is truncated or damaged ({error})") from error


def _checked_tensors(
    path: Path, identity: Mapping[str, str], *, with_digest: bool
) -> dict[str, Tensor]:
    """The file's tensors; raises _UnusableError unless they are whole, and of this identity."""
    with _opened(path) as file:
        metadata = file.metadata()
        _check_identity(metadata, identity)
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _UnusableError(f"it is damaged ({error})") from error
    if str(_size(tensors)) != metadata.get(_NUM_BYTES):
        raise _UnusableError(f"it holds {_size(tensors)} bytes of {metadata.get(_NUM_BYTES)}")
    if with_digest and _digest(tensors) != metadata.get(_DIGEST):
        raise _UnusableError("its numbers do not match their SHA-256")
    return tensors


def _check_identity(metadata: Mapping[str, str] | None, identity: Mapping[str, str]) -> None:
    try:
        theirs = json.loads((metadata or {})[_IDENTITY])
    except (KeyError, json.JSONDecodeError) as error:
        raise _UnusableError("it does not say what it was made of") from error
    names = sorted({*theirs, *identity})
    if different := [name for name in names if theirs.get(name) != identity.get(name)]:
        raise _UnusableError(f"it was made with another {', '.join(different)}")


def _save(tensors: Mapping[str, Tensor], path: Path, identity: Mapping[str, str]) -> int:
    """Write beside the place, flush and rename; the file's size."""
    metadata = {
        _IDENTITY: json.dumps(dict(identity), sort_keys=True),
        _NUM_BYTES: str(_size(tensors)),
        _DIGEST: _digest(tensors),
    }
    partial = path.with_name(f"{path.name}.partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path.stat().st_size


def _pack(features: Sequence[SequenceFeatures], *, with_hidden: bool) -> dict[str, Tensor]:
    tensors = {
        "tokens": torch.cat([f.tokens_T for f in features]).cpu(),
        "num_tokens": torch.tensor([len(f) for f in features]),
        "num_prompt_tokens": torch.tensor([f.num_prompt_tokens for f in features]),
    }
    if with_hidden:
        tensors["hidden"] = torch.cat([f.hidden_TD for f in features]).cpu()
    return tensors


def _unpack(tensors: Mapping[str, Tensor]) -> Shard:
    lengths = tensors["num_tokens"].tolist()
    sequences = [
        TokenSequence(tokens_T=tokens_T, num_prompt_tokens=num_prompt_tokens)
        for tokens_T, num_prompt_tokens in zip(
            torch.split(tensors["tokens"], lengths),
            tensors["num_prompt_tokens"].tolist(),
            strict=True,
        )
    ]
    if "hidden" not in tensors:
        return Shard(sequences=sequences, features=None)
    features = [
        SequenceFeatures(
            tokens_T=sequence.tokens_T,
            hidden_TD=hidden_TD,
            num_prompt_tokens=sequence.num_prompt_tokens,
            rl_step=0,
        )
        for sequence, hidden_TD in zip(
            sequences, torch.split(tensors["hidden"], lengths), strict=True
        )
    ]
    return Shard(sequences=sequences, features=features)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
