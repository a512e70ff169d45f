"""Publishing weights to SGLang: names checked, handles instead of copies, bucket by bucket.

A bucket is a list of (name, tensor) pickled as the handles of its memory: a CUDA IPC handle, by
which live parameters are read where they are, or on a CPU shared memory that holds a copy. At most
one bucket of tensors that had to be made (gathered from shards, cast, copied) exists at a time.

SGLang answers "Success" to a name that it does not know. So names and shapes are compared here with
the model's own; and once, when an engine has started, every weight is filled with a number, and the
checksums before and after show whether these names lead to all weights that SGLang has.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastrl.rollout.sglang_comparison import folder_entry, read_differences
from fastrl.rollout.sglang_process import EngineProcess, Role
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.rollout.weights import check_fits

NamedTensors = Iterable[tuple[str, Tensor]]

MESSAGE_TIMEOUT_S = 300.0
"""For one message about weights or memory, a bucket's transfer included."""

_PROBE_VALUE = 0.7071
"""No checkpoint has a tensor of this number alone."""
_MODELS: dict[Role, str] = {"target": "policy", "draft": "drafter"}
_SHARED_WITH_POLICY = ("draft.model.embed_tokens.", "draft.lm_head.")


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
        num_ranks: of the tensor-parallel group that serves them.
    """

    def __init__(
        self,
        process: EngineProcess,
        role: Role,
        skeleton: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket_mib: int,
        num_ranks: int = 1,
    ) -> None:
        self._process, self._role = process, role
        self._num_ranks = num_ranks
        self._skeleton = skeleton
        self._dtype, self._device = dtype, device
        self._bucket_bytes = bucket_mib * 2**20

    def publish(self, named_tensors: NamedTensors) -> None:
        """Send all weights, and have what was computed with the old ones forgotten.

        Tensors are taken one by one as they come: sharded ones may be gathered on the way. From the
        first that does not fit, nothing more is sent.

        Raises ValueError naming all missing, unknown and misshapen tensors.
        """
        self._send("update", map(_handles, self._buckets(named_tensors)))

    def compare(self, named_tensors: NamedTensors) -> list[WeightDifference]:
        """Send all weights as `publish` does, to be held against those that are served.

        Takes what a publication takes, in time and in bandwidth. Raises as `publish` does.
        """
        with TemporaryDirectory(prefix="fastrl-weights-") as folder:
            self._send(
                "compare",
                (
                    _handles([folder_entry(Path(folder)), *bucket])
                    for bucket in self._buckets(named_tensors)
                ),
            )
            return read_differences(Path(folder), self._num_ranks)

    def _send(self, request: Literal["update", "compare"], payloads: Iterable[bytes]) -> None:
        call = self._process.call
        call("begin_update", MESSAGE_TIMEOUT_S, role=self._role)
        try:
            for payload in payloads:
                call(request, MESSAGE_TIMEOUT_S, role=self._role, payload=payload)
        finally:
            if not self._process.has_ended:
                call("end_update", MESSAGE_TIMEOUT_S, has_new_weights=request == "update")

    def publish_probe(self) -> None:
        """Send one number in place of every weight."""
        tensors = (
            torch.full(tensor.shape, _PROBE_VALUE, dtype=self._dtype, device=self._device)
            for tensor in self._skeleton.values()
        )
        self.publish(zip(self._skeleton, tensors, strict=True))

    def _buckets(self, named_tensors: NamedTensors) -> Iterator[list[tuple[str, Tensor]]]:
        given: dict[str, Tensor] = {}
        bucket: list[tuple[str, Tensor]] = []
        num_bytes = 0
        has_misfit = False
        for name, tensor in named_tensors:
            given[name] = torch.empty(tensor.shape, device="meta")
            own = self._skeleton.get(name)
            has_misfit |= own is None or own.shape != tensor.shape
            if has_misfit:
                continue  # all are seen: ranks that gather must go on, and the error names all
            ready = self._ready(tensor)
            if bucket and num_bytes + ready.nbytes > self._bucket_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append((name, ready))
            num_bytes += ready.nbytes
        check_fits(given, self._skeleton, what=f"{_MODELS[self._role]} weights for SGLang")
        yield bucket

    def _ready(self, tensor: Tensor) -> Tensor:
        """In the engine's dtype, where it can be shared: on a CPU sharing would move the original
        to shared memory, so a copy is."""
        ready = tensor.detach().to(self._device, self._dtype).contiguous()
        if ready.device.type == "cpu" and ready.data_ptr() == tensor.data_ptr():
            ready = ready.clone()
        return ready


def weight_checksums(process: EngineProcess) -> list[dict[str, str]]:
    """Of SGLang's weights by its own names (`draft.` before the drafter's), for each
    tensor-parallel rank."""
    checksums: list[dict[str, str]] = process.call("checksums", MESSAGE_TIMEOUT_S)
    return checksums


def check_every_weight_is_reached(
    process: EngineProcess, policy: WeightPublisher, drafter: WeightPublisher | None
) -> None:
    """Fill all weights with a number, and raise ValueError naming those that have not changed.

    The drafter's embedding and LM head are the policy's: they must change with these.
    """
    before = weight_checksums(process)
    policy.publish_probe()
    between = weight_checksums(process)
    unreached = [name for name in _unchanged(before, between) if not _is_drafters(name)]
    if drafter is not None:
        drafter.publish_probe()
        unreached += filter(_is_drafters, _unchanged(between, weight_checksums(process)))
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


def _is_drafters(name: str) -> bool:
    """Whether a weight, by SGLang's name, is the drafter's own."""
    return name.startswith("draft.") and not name.startswith(_SHARED_WITH_POLICY)


def _handles(named_tensors: list[tuple[str, Tensor]]) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(named_tensors)
    return buffer.getvalue()
