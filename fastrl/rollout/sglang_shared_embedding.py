"""Has SGLang's drafter share the policy's embedding and LM head before the cache is sized.

SGLang builds an EAGLE drafter with an embedding and an LM head of its own, takes for the cache what
memory is left, and only then puts the policy's in their place: too late for the cache. For
Qwen2.5-7B these are 2 * 152064 * 3584 numbers, 2.2 GB, the keys and values of some 37,000 tokens.
Here they are shared first.

A drafter with a vocabulary of its own has an LM head of its own, the policy's rows for its tokens,
which SGLang copies once: `refresh_draft_head` copies them again after the policy was published, or
the drafter would go on with those of the start and less and less of what it drafts be accepted.

Called in SGLang's scheduler, by FastRL's plugin.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl.rollout.sglang_hooks import hook_in

_SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def register() -> None:
    """Have it done in every scheduler that this process starts; a plugin of SGLang's calls it."""
    hook_in(
        "sglang.srt.managers.scheduler.Scheduler.init_memory_pools", _share_before_pools, "before"
    )


def own_embedding_bytes(eagle_worker: Any) -> dict[str, int]:
    """Of an embedding and LM head that the drafter holds beside the policy's, by name.

    Args:
        eagle_worker: SGLang's `EAGLEWorkerV2`, its models loaded.
    """
    target = eagle_worker.target_worker.model_runner.model
    drafter = eagle_worker._draft_worker.draft_runner.model
    policys = {parameter.data_ptr() for parameter in target.parameters()}
    return {
        name: parameter.nbytes
        for name, parameter in drafter.named_parameters(remove_duplicate=False)
        if name in _SHARED and parameter.data_ptr() not in policys
    }


def _share_before_pools(scheduler: Any) -> None:
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    worker = scheduler.draft_worker
    if not isinstance(worker, EAGLEWorkerV2):
        return
    drafting = worker._draft_worker
    drafting.init_token_map()
    drafting.init_lm_head()  # SGLang does it again after the cache is sized, to no effect
    own = own_embedding_bytes(worker)
    if drafting.hot_token_id is not None or scheduler.spec_algorithm.is_eagle3():
        own.pop("lm_head.weight", None)
    if own:
        raise RuntimeError(
            f"SGLang's drafter keeps weights of its own beside the policy's, which its cache would "
            f"be smaller by: {own} bytes. Its architecture does not share them: use an EAGLE "
            f"drafter, or TorchEngine"
        )


def refresh_draft_head(scheduler: Any) -> None:
    """Copy the policy's rows for the drafter's vocabulary, into the memory that graphs read."""
    if rows := _draft_head_rows(scheduler):
        own_FD, policys_FD = rows
        own_FD.copy_(policys_FD)


def draft_head_difference(scheduler: Any) -> tuple[int, int, int]:
    """Of the drafter's own LM head: numbers, those that are not the policy's, and those that are
    not zero; no numbers where it is the policy's."""
    if not (rows := _draft_head_rows(scheduler)):
        return 0, 0, 0
    own_FD, policys_FD = rows
    return own_FD.numel(), int((own_FD != policys_FD).sum()), int(own_FD.count_nonzero())


def _draft_head_rows(scheduler: Any) -> tuple[Tensor, Tensor] | None:
    """The drafter's LM head, and what it should be; None where it is the policy's own."""
    worker = scheduler.draft_worker
    drafting: Any = getattr(worker, "_draft_worker", None)
    token_map_F = getattr(drafting, "hot_token_id", None)
    if token_map_F is None or scheduler.spec_algorithm.is_eagle3():
        return None
    _, policys = worker.target_worker.model_runner.model.get_embed_and_head()
    own: Tensor = drafting.draft_runner.model.lm_head.weight
    return own.data, policys.data[token_map_F]
