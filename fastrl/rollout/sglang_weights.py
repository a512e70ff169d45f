"""Publishing weights to SGLang: names checked, handles instead of copies, bucket by bucket.

A bucket is a list of (name, tensor) pickled as the handles of its memory: a CUDA IPC handle, by
which live parameters are read where they are, or on a CPU shared memory that holds a copy. At most
one bucket of tensors that had to be made (gathered from shards, cast, copied) exists at a time: it
is gone before the next is begun. Each rank of the trainer that shares the engine hands over its
own, for the rank of SGLang on its GPU.

SGLang answers "Success" to a name that it does not know. So names and shapes are compared here with
the model's own; and once, when an engine has started, every weight is filled with a number, and the
checksums before and after show whether these names lead to all weights that SGLang has.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sglang_comparison import folder_entry, read_differences
from fastrl.rollout.sglang_process import EngineError, Role
from fastrl.rollout.sharded_weights import is_shared, whole
from fastrl.rollout.shared_process import SharedProcess
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.rollout.weights import check_fits

NamedTensors = Iterable[tuple[str, Tensor]]

MESSAGE_TIMEOUT_S = 300.0
"""For one message about weights or memory, a bucket's transfer included."""

_PROBE_VALUE = 0.7071
"""No checkpoint has a tensor of this number alone."""
_MODELS: dict[Role, str] = {"target": "policy", "draft": "drafter"}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def policy_skeleton(config: PretrainedConfig) -> dict[str, Tensor]:
    """The policy's weights by Hugging Face name, without memory; a tied LM head is none of them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return dict(model.named_parameters())


class WeightPublisher:
    """Sends one model's weights.

    Args:
        process: of the engine.
        role: which of its models takes them, and no other does.
        skeleton: the model's own names and shapes.
        dtype, device: of the engine's weights.
        bucket_mib: most MiB of tensors sent in one message; a larger tensor is a bucket of its own.
        num_readers: ranks of SGLang that read what this rank of the trainer hands over.
    """

    def __init__(
        self,
        process: SharedProcess,
        role: Role,
        skeleton: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket_mib: int,
        num_readers: int = 1,
    ) -> None:
        self._process, self._role = process, role
        self.skeleton = skeleton
        self._dtype, self._device = dtype, device
        self._bucket_bytes = bucket_mib * 2**20
        self._num_readers = num_readers

    def publish(self, named_tensors: NamedTensors) -> None:
        """Send all weights, and have what was computed with the old ones forgotten.

        Tensors are taken one by one as they come, and sharded ones gathered, from all ranks of
        their mesh; from the first that does not fit, nothing more is gathered or sent. When
        SGLang fails, the rest is gathered all the same: other engines' ranks wait for it.

        Raises ValueError naming all missing, unknown and misshapen tensors.
        """
        self._send("update", self._buckets(named_tensors))

    def compare(self, named_tensors: NamedTensors) -> list[WeightDifference]:
        """Send all weights as `publish` does, to be held against those that are served; and have
        buffers held against those that were remembered.

        Takes what a publication takes, in time and in bandwidth. Raises as `publish` does.
        """
        ranks = self._process.ranks
        with _folder_of_leader(ranks) as folder:
            self._send("compare", self._buckets(named_tensors), folder_entry(folder))
            return ranks.lead(
                f"differences of the {self._role} model",
                lambda: read_differences(folder, self._num_readers * ranks.size),
            )

    def remember_buffers(self) -> None:
        """Have SGLang keep what it holds beside weights, for `compare` to hold against."""
        self._send("remember", iter([[]]))

    def _send(
        self,
        request: Literal["update", "compare", "remember"],
        buckets: Iterator[list[tuple[str, Tensor]]],
        *first: tuple[str, Tensor],
    ) -> None:
        """All buckets, each after these first entries."""
        process = self._process

        def next_payloads() -> list[bytes] | None:
            """Handles to the next bucket's tensors, which the iterator keeps until it goes on; for
            each reader its own, for they are used up."""
            if (bucket := next(buckets, None)) is None:
                return None
            return [_handles([*first, *bucket]) for _ in range(self._num_readers)]

        try:
            process.call("begin_update", MESSAGE_TIMEOUT_S, role=self._role)
            while process.send_bucket(request, self._role, next_payloads, MESSAGE_TIMEOUT_S):
                pass
        except EngineError:
            for bucket in buckets:
                bucket.clear()
            raise
        finally:
            if not process.has_ended:
                process.call("end_update", MESSAGE_TIMEOUT_S, has_new_weights=request == "update")

    def publish_probe(self) -> None:
        """Send one number in place of every weight."""
        tensors = (
            torch.full(tensor.shape, _PROBE_VALUE, dtype=self._dtype, device=self._device)
            for tensor in self.skeleton.values()
        )
        self.publish(zip(self.skeleton, tensors, strict=True))

    def _buckets(self, named_tensors: NamedTensors) -> Iterator[list[tuple[str, Tensor]]]:
        given: dict[str, Tensor] = {}
        bucket: list[tuple[str, Tensor]] = []
        num_bytes = 0
        has_misfit = False
        for name, tensor in named_tensors:
            given[name] = torch.empty(tensor.shape, device="meta")
            own = self.skeleton.get(name)
            has_misfit |= own is None or own.shape != tensor.shape
            if has_misfit:
                continue  # all are seen: the error names all
            size = tensor.numel() * self._dtype.itemsize
            if bucket and num_bytes + size > self._bucket_bytes:
                yield bucket
                num_bytes = self._emptied(bucket)
            bucket.append((name, self._ready(tensor)))
            num_bytes += size
        check_fits(given, self.skeleton, what=f"{_MODELS[self._role]} weights for SGLang")
        yield bucket
        self._emptied(bucket)

    def _emptied(self, bucket: list[tuple[str, Tensor]]) -> int:
        """Free a bucket that SGLang has read, before the next is made; 0 bytes are left."""
        bucket.clear()
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        return 0

    def _ready(self, tensor: Tensor) -> Tensor:
        """Whole, in the engine's dtype, where it can be shared: on a CPU sharing would move the
        original to shared memory, so a copy is."""
        ready = whole(tensor, dtype=self._dtype, device=self._device).contiguous()
        if ready.device.type == "cpu" and is_shared(ready, tensor):
            ready = ready.clone()
        return ready


@contextmanager
def _folder_of_leader(ranks: EngineGroup) -> Iterator[Path]:
    """A temporary one, known to all ranks."""
    with ExitStack() as on_exit:
        name = ranks.lead(
            "folder of differences",
            lambda: on_exit.enter_context(TemporaryDirectory(prefix="fastrl-weights-")),
        )
        yield Path(name)


def check_ranks_agree(ranks: EngineGroup, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError naming tensors that differ between ranks which share an engine: each rank
    of SGLang would take another."""
    if ranks.size == 1:
        return
    sums = ranks.gather(
        "checksums of a drafter to load",
        lambda: {name: _sum_of_bits(tensor) for name, tensor in named_tensors},
    )
    names = {name for own in sums for name in own}
    if different := sorted(name for name in names if len({own.get(name) for own in sums}) > 1):
        raise ValueError(
            f"ranks that share an engine hold different drafters: {different} are not the same on "
            f"all {ranks.size}; average the ranks' drafters before they are published"
        )


def _sum_of_bits(tensor: Tensor) -> int:
    return int(tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def weight_checksums(process: SharedProcess) -> list[dict[str, str]]:
    """Of SGLang's weights by its own names (`draft.` before the drafter's), for each
    tensor-parallel rank."""
    checksums: list[dict[str, str]] = process.call("checksums", MESSAGE_TIMEOUT_S)
    return checksums


def check_every_weight_is_reached(
    process: SharedProcess, policy: WeightPublisher, drafter: WeightPublisher | None
) -> None:
    """Fill all weights with a number, and raise ValueError naming those that have not changed.

    The drafter's embedding is the policy's and must change with it, as must its LM head, unless
    that is among the drafter's own weights.
    """
    has_own_head = drafter is not None and "lm_head.weight" in drafter.skeleton
    before = weight_checksums(process)
    policy.publish_probe()
    between = weight_checksums(process)
    unreached = [
        name for name in _unchanged(before, between) if not _is_drafters(name, has_own_head)
    ]
    if drafter is not None:
        drafter.publish_probe()
        after = weight_checksums(process)
        unreached += [
            name for name in _unchanged(between, after) if _is_drafters(name, has_own_head)
        ]
    if unreached:
        raise ValueError(
            f"a publication under Hugging Face names does not reach these weights of SGLang's "
            f"model: {unreached}; they would stay as they are for the whole run. Use TorchEngine "
            f"for this model"
        )


def _unchanged(then: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    return sorted(
        {
            name
            for rank_then, rank_now in zip(then, now, strict=True)
            for name, checksum in rank_now.items()
            if rank_then[name] == checksum
        }
    )


def _is_drafters(name: str, has_own_head: bool) -> bool:
    """Whether a weight, by SGLang's name, is the drafter's own."""
    if name.startswith("draft.lm_head."):
        return has_own_head
    return name.startswith("draft.") and not name.startswith("draft.model.embed_tokens.")


def _handles(named_tensors: list[tuple[str, Tensor]]) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(named_tensors)
    return buffer.getvalue()
