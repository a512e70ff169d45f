"""Checkpoint files: no moment without a good one, and no damage that goes unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrl import checkpoint_io
from fastrl.checkpoint_io import AtomicCheckpointIO, check_intact

ROOT = Path(__file__).parents[1]
CHECKPOINT = {"weights": torch.arange(40.0), "counts": [1, 2, ("three", 3.5)]}


def save(path: Path, step: int = 0) -> Path:
    AtomicCheckpointIO().save_checkpoint({**CHECKPOINT, "step": step}, path)
    return path


def load(path: Path) -> dict[str, object]:
    return AtomicCheckpointIO().load_checkpoint(path)


def test_what_is_saved_is_loaded_also_by_plain_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "folder" / "a.ckpt", step=3)
    mapped = torch.load(path, weights_only=True, mmap=True)
    for loaded in (load(path), torch.load(path, weights_only=True), mapped):
        assert (loaded["step"], loaded["counts"]) == (3, CHECKPOINT["counts"])
        assert torch.equal(loaded["weights"], CHECKPOINT["weights"])
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    content = path.read_bytes()
    damaged = [content[:length] for length in range(len(content))]
    damaged += [
        content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        for place in range(len(content))
    ]
    for number, variant in enumerate(damaged):
        path.write_bytes(variant)
        with pytest.raises(ValueError, match=r"a\.ckpt is corrupt"):
            check_intact(path)
        if number % 400 == 0:  # what a user does comes to the same
            with pytest.raises(ValueError, match=r"a\.ckpt is corrupt"):
                load(path)


def test_a_corrupt_checkpoint_is_named_with_the_newest_intact_one(tmp_path: Path) -> None:
    for step, name in enumerate(["step-10.ckpt", "step-20.ckpt", "step-30.ckpt", "last.ckpt"]):
        os.utime(save(tmp_path / name), (step, step))
    (tmp_path / "step-30.ckpt").write_bytes(b"")
    last = tmp_path / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    with pytest.raises(ValueError, match="checksum is missing") as error:
        load(last)
    assert str(error.value).endswith(f"resume with --ckpt_path {tmp_path / 'step-20.ckpt'}")
    for other in tmp_path.glob("step-*"):
        other.unlink()
    last.write_bytes(b"")
    with pytest.raises(ValueError, match="it has 0 bytes; no other is beside it"):
        load(last)


def test_a_missing_or_remote_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--ckpt_path last"):
        load(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="copy it here"):
        AtomicCheckpointIO().load_checkpoint("s3://bucket/a.ckpt")


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.ckpt", step=1)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(path, step=2)
    assert load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, moment: str
) -> None:
    """SIGKILL when the new bytes are written but not renamed; then the next save goes through."""
    path = save(tmp_path / "a.ckpt", step=1)
    program = f"""
import os, signal, sys
from pathlib import Path
from tests.test_checkpoint_io import save
os.{moment} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
save(Path(sys.argv[1]), step=2)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "a.ckpt.partial").exists()
    assert load(path)["step"] == 1
    save(path, step=3)
    assert load(path)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(f"{Path(source).name} becomes {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(checkpoint_io.os, "fsync", fsync)
    monkeypatch.setattr(checkpoint_io.os, "replace", replace)
    save(tmp_path / "a.ckpt")
    assert calls == [
        "fsync a.ckpt.partial",
        "a.ckpt.partial becomes a.ckpt",
        f"fsync {tmp_path.name}",
    ]
