"""SGLang loads this by its entry point, in each of its processes, and runs `activate`."""

import json
import os
from pathlib import Path

import torch


def activate():
    """Let SGLang do on any CPU what it does on a GPU, as far as the tests need it."""
    _accept_any_cpu()
    _verify_by_sampling()
    _allow_seeded_sampling()
    _stay_stock()
    _lose_a_hook()
    _report_embeddings()
    _lose_memory()
    torch.cuda.synchronize = lambda device=None: None  # its checksums wait for a GPU


def _accept_any_cpu():
    """Its one CPU backend that speculates wants AMX, whose two kernels have stand-ins."""
    from sglang.srt import runtime_context

    runtime_context.override_platform(has_amx=True).__enter__()


def _verify_by_sampling():
    """On a CPU it takes the target's best token whatever the temperature."""
    from sglang.srt.speculative import eagle_utils

    if "_verify_uses_greedy" in vars(eagle_utils):  # since 0.5.21
        eagle_utils._verify_uses_greedy = lambda *, is_all_greedy, **_: is_all_greedy
        return
    sample = eagle_utils.eagle_sample

    def sample_as_on_a_gpu(verify_input, batch, *args, **kwargs):
        eagle_utils._is_cpu = batch.sampling_info.is_all_greedy
        try:
            return sample(verify_input, batch, *args, **kwargs)
        finally:
            eagle_utils._is_cpu = True

    eagle_utils.eagle_sample = sample_as_on_a_gpu


def _allow_seeded_sampling():
    """Seeds come with deterministic inference, which knows GPU backends only; float32 on a CPU
    needs no kernels of its own for that."""
    from sgl_kernel import seeded_noise
    from sglang.kernels.ops.sampling import murmur_hash
    from sglang.srt import batch_invariant_ops, server_args
    from sglang.srt.layers import sampler

    # A list that is defined elsewhere since 0.5.20, and the same there.
    server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("intel_amx")
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None
    for module in (murmur_hash, sampler):  # for a GPU alone before 0.5.20
        module.murmur_hash32 = seeded_noise.murmur_hash32


def _stay_stock():
    """For tests of an SGLang without FastRL's plugin: it answers requests, and hooks nothing."""
    if "FASTRL_TEST_STOCK" in os.environ:
        from fastrl.rollout.sglang_plugin import answer_requests

        answer_requests()


def _lose_a_hook():
    """For the test of hooks: SGLang takes that function for one it has been through."""
    if "FASTRL_TEST_LOST_HOOK" in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry

        HookRegistry._patched.add(os.environ["FASTRL_TEST_LOST_HOOK"])


def _report_embeddings():
    """For the test of shared embeddings: what the drafter holds when the cache is sized."""
    if "FASTRL_TEST_EMBEDDINGS" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from fastrl.rollout import sglang_shared_embedding

    def report(scheduler):
        own = sglang_shared_embedding.own_embedding_bytes(scheduler.draft_worker)
        Path(os.environ["FASTRL_TEST_EMBEDDINGS"]).write_text(json.dumps(own))

    name = "sglang.srt.managers.scheduler.Scheduler.init_target_memory_pool"
    HookRegistry.register(name, report, HookType.BEFORE)
    if "FASTRL_TEST_SHARED" in os.environ:
        sglang_shared_embedding.register()


def _lose_memory():
    """For the test of buffers: memory that was given back comes back as zeros, as on a GPU."""
    if "FASTRL_TEST_LOSE_MEMORY" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    @torch.no_grad()
    def lose(manager, request):
        models = [manager.tp_worker.model_runner.model]
        models.append(manager.draft_worker._draft_worker.draft_runner.model)
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()

    updater = (
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    )
    HookRegistry.register(f"{updater}.resume_memory_occupation", lose, HookType.BEFORE)
