"""How a checkpoint gets to the disk and back: whole, or not at all, and never a damaged one.

Written to a file beside its place, flushed to the disk and renamed, so that whenever the process or
the machine stops, the place holds the old checkpoint or the new one. (Lightning's own writer goes
through the system's temporary folder and flushes nothing: from another file system its rename is a
copy.) After the bytes of `torch.save` comes a SHA-256 of them, 79 bytes that torch.load ignores;
it is compared before anything is unpickled.

Leaves out remote and sharded checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

_MAGIC = b"\nfastrl-sha256 "
_TRAILER_BYTES = len(_MAGIC) + 2 * hashlib.sha256().digest_size


class AtomicCheckpointIO(TorchCheckpointIO):
    """A Lightning plugin (`Trainer(plugins=[...])`); FastRLCLI adds it where none is configured."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Replace the checkpoint at `path`, or leave it as it is.

        Raises:
            ValueError: `path` is no local file, or there are storage options.
        """
        if storage_options is not None:
            raise ValueError(f"local checkpoints take no storage_options, got {storage_options}")
        place = _local(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.partial")  # the next attempt overwrites it
        try:
            with partial.open("w+b") as file:
                torch.save(checkpoint, file)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256")
                file.seek(0, os.SEEK_END)
                file.write(_MAGIC + digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, place)
        except BaseException:  # Ctrl-C and a full disk alike: nothing is left behind
            partial.unlink(missing_ok=True)
            raise
        _flush_folder(place.parent)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain values, after `check_intact`."""
        check_intact(_local(path))
        return super().load_checkpoint(
            Path(path), map_location, weights_only=weights_only is not False
        )


def check_intact(path: Path) -> None:
    """Raise ValueError, naming the newest intact checkpoint beside it, if `path` is damaged.

    Raises FileNotFoundError if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist (looked in {Path.cwd()}); give the path of a file, "
            f"or `--ckpt_path last` for the last run under trainer.default_root_dir"
        )
    if (damage := _damage(path)) is None:
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
    intact = next((other for other in others if other != path and _damage(other) is None), None)
    cure = f"resume with --ckpt_path {intact}" if intact else "no other is beside it; start anew"
    raise ValueError(f"checkpoint {path} is corrupt: {damage}; {cure}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if nothing is."""
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes < _TRAILER_BYTES:
            return f"it has {num_bytes} bytes"
        file.seek(num_bytes - _TRAILER_BYTES)
        trailer = file.read()
        if not trailer.startswith(_MAGIC):
            return "its checksum is missing, so it is truncated, or not written by FastRL"
        file.seek(0)
        digest = hashlib.sha256()
        remaining = num_bytes - _TRAILER_BYTES
        while chunk := file.read(min(remaining, 1 << 20)):
            digest.update(chunk)
            remaining -= len(chunk)
    if digest.hexdigest().encode() != trailer.removeprefix(_MAGIC):
        return "its bytes do not match its SHA-256"
    return None


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(
            f"checkpoints are files on a local or mounted disk, got {path}; copy it here, or name "
            f"a CheckpointIO of your own in trainer.plugins"
        )
    return Path(path)


def _flush_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, on systems where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
