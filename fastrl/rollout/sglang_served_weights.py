"""The two models that a started SGLang serves: what they were given, and whether they are whole.

How weights get there is told in sglang_weights.py; leaves out judging a drafter
(drafter_health.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PretrainedConfig

from fastrl.rollout.drafters.checkpoints import without_shared
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sglang_options import SGLangOptions
from fastrl.rollout.sglang_process import Role
from fastrl.rollout.sglang_weights import (
    WeightPublisher,
    check_every_weight_is_reached,
    check_ranks_agree,
    policy_skeleton,
)
from fastrl.rollout.shared_process import SharedProcess
from fastrl.rollout.weight_differences import WeightDifference

NamedTensors = Iterable[tuple[str, Tensor]]


class ServedWeights:
    """Policy and drafter, by their publishers and versions.

    Args:
        process: SGLang's.
        config: of the policy.
        drafter: that speculation uses; None without any.
        options: of the engine.
    """

    def __init__(
        self,
        process: SharedProcess,
        config: PretrainedConfig,
        drafter: EagleDrafter | None,
        options: SGLangOptions,
    ) -> None:
        self._process = process
        self._has_tied_head = bool(config.tie_word_embeddings)

        def publisher(role: Role, skeleton: Mapping[str, Tensor]) -> WeightPublisher:
            return WeightPublisher(
                process,
                role,
                skeleton,
                dtype=options.torch_dtype,
                device=options.device,
                bucket_mib=options.bucket_mib,
                num_readers=options.tp_size // process.ranks.size,
            )

        self.policy = publisher("target", policy_skeleton(config))
        self.drafter: WeightPublisher | None = None
        if drafter is not None:
            self.drafter = publisher("draft", dict(drafter.named_weights()))
        self.policy_version = self.drafter_version = -1
        self._has_policy, self._has_drafter = False, True

    def check_names(self) -> None:
        """Raise ValueError naming weights of SGLang's models that publications do not reach; all
        weights are lost by it."""
        check_every_weight_is_reached(self._process, self.policy, self.drafter)

    def remember_buffers(self) -> None:
        """What the models hold beside weights is as it should be: comparisons go by it."""
        self.policy.remember_buffers()
        if self.drafter is not None:
            self.drafter.remember_buffers()

    def publish_policy(self, named_tensors: NamedTensors, version: int) -> None:
        """Send all of the policy's weights; see `WeightPublisher.publish`."""
        self._has_policy, self.policy_version = False, -1
        self.policy.publish(self._without_tied(named_tensors))
        self._has_policy, self.policy_version = True, version

    def publish_drafter(self, weights: Sequence[tuple[str, Tensor]], version: int) -> None:
        """Send all of the drafter's own weights.

        Raises ValueError as `publish_policy` does, and for ranks with different ones.
        """
        assert self.drafter is not None, "SGLang was started without a drafter"
        check_ranks_agree(self._process.ranks, weights)
        self._has_drafter, self.drafter_version = False, -1
        self.drafter.publish(weights)
        self._has_drafter, self.drafter_version = True, version

    def compare_policy(self, named_tensors: NamedTensors) -> list[WeightDifference]:
        """The policy's weights that differ from these."""
        return self.policy.compare(self._without_tied(named_tensors))

    def compare_drafter(self, named_tensors: NamedTensors) -> list[WeightDifference]:
        """The drafter's weights that differ from these; none without a drafter."""
        return [] if self.drafter is None else self.drafter.compare(without_shared(named_tensors))

    def forget_versions(self) -> None:
        """Whatever they are, it is not those that a resumed run knows."""
        self.policy_version = self.drafter_version = -1

    def lose(self) -> None:
        """Their memory is given back: both must be published anew."""
        self._has_policy, self.policy_version = False, -1
        self._has_drafter, self.drafter_version = self.drafter is None, -1

    def check_whole(self) -> None:
        """Raise ValueError unless both have been published."""
        if not self._has_policy:
            raise ValueError("the engine has no weights: call load_policy before generate")
        if not self._has_drafter:
            raise ValueError(
                "the engine's drafter is not whole, since it slept or a publication failed: call "
                "load_drafter before generate"
            )

    def _without_tied(self, named_tensors: NamedTensors) -> NamedTensors:
        if not self._has_tied_head:
            return named_tensors
        return (one for one in named_tensors if one[0] != "lm_head.weight")
