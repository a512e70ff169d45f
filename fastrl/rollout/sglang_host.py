"""The child process that owns SGLang's engine.

It answers the trainer's messages one at a time (sglang_process.py). What the versions of SGLang
from 0.5.17 to 0.5.21 do differently is settled here. When it ends, for whatever reason, its process
group ends with it, and when the trainer ends, it does.

Leaves out any decision: what to generate and which weights fit is settled in the trainer.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from typing import Any

from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sampling import combined_key
from fastrl.rollout.sglang_comparison import COMPARERS, REMEMBERERS, is_drafter
from fastrl.rollout.sglang_hidden_states import in_order
from fastrl.rollout.sglang_hooks import numbers_of
from fastrl.rollout.sglang_plugin import ALGORITHM, RPC_PREFIX, packed, unpacked
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_process import Outcome, RawResponse, Role, StartedEngine
from fastrl.rollout.sglang_steps import Rehearsal, RequestSteps, SessionReport

_WATCH_INTERVAL_S = 0.5
_RPC_TIMEOUT_S = 120
"""A scheduler answers between two steps, or two chunks of a prefill."""
_IDLE_TIMEOUT_S = 60
"""Within which a step that is under way ends."""
_OLDEST, _TOO_NEW = (0, 5, 17), (0, 5, 22)


class EngineHost:
    """SGLang's engine, and the requests it answers; one `serve_…` function each."""

    def __init__(self) -> None:
        import sglang

        self._version_text: str = sglang.__version__
        self._version = numbers_of(sglang.__version__)
        if not _OLDEST <= self._version < _TOO_NEW:
            raise RuntimeError(
                f"sglang {sglang.__version__} is installed; this adapter knows 0.5.17 to 0.5.21: "
                f"pip install 'sglang>=0.5.17,<0.5.22'"
            )
        self._engine: Any = None
        self._has_own_head = False  # the drafter, of a vocabulary of its own

    def serve_start(
        self, server_args: Mapping[str, Any], pool: StrategyPool | None
    ) -> StartedEngine:
        """Start the engine with SGLang's own arguments; with a pool, under FastRL's plugin."""
        import sglang

        server_args = dict(server_args)
        self._has_own_head = "speculative_token_map" in server_args
        _check_plugin()
        if pool is not None:
            pool.write_to(os.environ)
        loaders = list(server_args.get("custom_weight_loader") or [])
        loaders += [*COMPARERS.values(), *REMEMBERERS.values()]
        if not self._has_update_sessions:
            loaders.append(DRAFTER_LOADER)
        server_args["custom_weight_loader"] = loaders
        self._engine = sglang.Engine(**server_args)
        self._check_hooks()
        scheduler = self._engine._scheduler_init_result.scheduler_infos[0]
        return StartedEngine(
            sglang_version=self._version_text,
            pool_tokens=int(scheduler["max_total_num_tokens"]),
            processes=tuple(self._engine.get_all_child_pids()),
        )

    # -- generation -------------------------------------------------------------------------------

    def serve_generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Mapping[str, Any]],
        return_hidden_states: bool,
        seeds_generators: bool,
        selector: StrategySelector | None,
    ) -> tuple[list[RawResponse], SessionReport | None]:
        """One response a prompt; with a selector, which chooses each step's strategy, what the
        steps did. A request that SGLang gives up has the response `abort`; the others go on.

        A prefix found in the cache has no hidden states, so where they are asked for, each request
        gets a part of the cache of its own.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        if seeds_generators:
            seeds = (int(parameters["sampling_seed"]) for parameters in sampling)
            self._ask("seed_generators", seed=combined_key(seeds))
        if selector is not None:
            self._ask("begin", selector=selector, rehearsal=None)
        keys = [f"{time.monotonic_ns()}-{number}" for number in range(len(prompts))]
        requests = [
            GenerateReqInput(
                rid=key,
                input_ids=list(prompt),
                sampling_params=dict(parameters),
                return_logprob=True,
                return_hidden_states=return_hidden_states,
                extra_key=key if return_hidden_states else None,
            )
            for key, prompt, parameters in zip(keys, prompts, sampling, strict=True)
        ]
        answers = self._wait(self._answers(requests))
        report: SessionReport | None = None
        if selector is not None:
            report = self._ask("finish")
        steps = {} if report is None else report.requests
        raws = [
            _raw_response(answer, len(prompt))
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        if report is not None:  # one that ended with its prefill has none
            raws = [
                replace(raw, steps=steps.get(key, RequestSteps()))
                for raw, key in zip(raws, keys, strict=True)
            ]
            report = replace(report, requests={})
        return raws, report

    async def _answers(self, requests: Sequence[Any]) -> list[Any]:
        """To all requests; of one that SGLang refuses or gives up, the exception.

        Sent as one, the first exception would be all that comes back, while the others still run.
        """
        ask = self._engine.tokenizer_manager.generate_request
        return await asyncio.gather(
            *(anext(ask(request, None)) for request in requests), return_exceptions=True
        )

    def serve_rehearse(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], rehearsal: Rehearsal
    ) -> SessionReport:
        """Run the strategies in turn over these prompts' rows; what their steps took."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        self._ask("begin", selector=None, rehearsal=rehearsal)
        request = GenerateReqInput(
            input_ids=[list(prompt) for prompt in prompts], sampling_params=dict(sampling)
        )
        self._wait(anext(self._engine.tokenizer_manager.generate_request(request, None)))
        report: SessionReport = self._ask("finish")
        self._flush()
        return report

    def _check_hooks(self) -> None:
        """SGLang only logs a hook that it could not apply."""
        if missing := self._ask("hooks_not_in_force"):
            raise RuntimeError(
                f"SGLang {self._version_text} did not apply FastRL's hooks of {missing}, and would "
                f"go on without them; its log says why"
            )

    def serve_flush_cache(self) -> None:
        """Nothing of past requests stays in SGLang's prefix cache."""
        self._flush()

    def serve_start_profile(self, folder: str) -> None:
        """Trace SGLang's schedulers from here on."""
        self._engine.start_profile(output_dir=folder, with_stack=False, record_shapes=False)

    def serve_stop_profile(self) -> None:
        """Write what was traced."""
        self._engine.stop_profile()

    def serve_graph_memory(self) -> dict[str, float]:
        """GiB that each strategy's graphs and buffers took."""
        gib: dict[str, float] = self._ask("graph_memory")
        return gib

    def _ask(self, method: str, **arguments: Any) -> Any:
        """FastRL's worker, over SGLang's RPC; waiting does not let SGLang see its scheduler die."""
        from sglang.srt.entrypoints import engine as transport
        from sglang.srt.managers.io_struct import RpcReqInput

        request = RpcReqInput(
            method=f"{RPC_PREFIX}{method}", parameters={"packed": packed(arguments)}
        )
        connection = self._engine.send_to_rpc
        transport.sock_send(connection, request)
        if not connection.poll(1000 * _RPC_TIMEOUT_S):
            raise TimeoutError(f"SGLang's scheduler did not answer {method} in {_RPC_TIMEOUT_S} s")
        answer = transport.sock_recv(connection)
        if not answer.success and f"no attribute '{RPC_PREFIX}" in answer.message:
            raise RuntimeError(
                "FastRL's plugin does not run in SGLang's scheduler, so that tokens would be "
                "filtered, and hidden states kept, in SGLang's own ways: is it left out by the "
                "variable SGLANG_PLUGINS? The log says whether it could not be loaded"
            )
        if not answer.success:
            raise RuntimeError(f"FastRL's worker refused {method}: {answer.message}")
        return unpacked(answer.message)

    # -- weights ----------------------------------------------------------------------------------

    def serve_begin_update(self, role: Role) -> None:
        """Before the buckets of one publication."""
        if self._has_update_sessions:
            self._check(self._engine.begin_weight_update(selector=role))

    def serve_update(self, role: Role, payloads: Sequence[bytes]) -> None:
        """Hand a bucket on: a payload for each tensor-parallel rank, handles to
        [(name, tensor), …], unread here."""
        # Before 0.5.21 the target has no switch to be left out by, so a loader leaves it out.
        is_old_draft = role == "draft" and not self._has_update_sessions
        self._update(role, payloads, loader=DRAFTER_LOADER if is_old_draft else None)

    def serve_compare(self, role: Role, payloads: Sequence[bytes]) -> None:
        """Have each rank compare its bucket with its weights (sglang_comparison.py), and report."""
        self._update(role, payloads, loader=COMPARERS[role])

    def serve_remember(self, role: Role, payloads: Sequence[bytes]) -> None:
        """Have each rank keep its buffers, to compare with later; the buckets are empty."""
        self._update(role, payloads, loader=REMEMBERERS[role])

    def _update(self, role: Role, payloads: Sequence[bytes], *, loader: str | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        route: dict[str, Any] = {}
        if self._has_update_sessions:
            route = {"selector": role}
        elif role == "target":
            route = {"disable_draft_model": True}
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=list(payloads),
            flush_cache=False,
            load_format=loader,
            **route,
        )
        manager = self._engine.tokenizer_manager
        self._check(self._wait(manager.update_weights_from_tensor(request, None)))

    def serve_end_update(self, has_new_weights: bool = True) -> None:
        """After the buckets of one publication: what the old weights computed is forgotten."""
        if self._has_update_sessions:
            self._check(self._engine.end_weight_update())
        if has_new_weights:
            if self._has_own_head:
                self._ask("refresh_draft_head")
            self._flush()

    def serve_draft_head_difference(self) -> tuple[int, int, int]:
        """See `draft_head_difference`."""
        if not self._has_own_head:
            return 0, 0, 0
        difference: tuple[int, int, int] = self._ask("draft_head_difference")
        return difference

    def _flush(self) -> None:
        # A response can arrive before the step that SGLang had under way beside it is over.
        manager = self._engine.tokenizer_manager
        flushed = self._wait(manager.flush_cache(timeout_s=_IDLE_TIMEOUT_S))
        self._check((flushed.success, f"the cache could not be emptied: {flushed.message}"))

    def serve_checksums(self) -> list[dict[str, str]]:
        """A checksum of each weight by SGLang's name for it, `draft.` before the drafter's; one
        dictionary for each tensor-parallel rank."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        manager = self._engine.tokenizer_manager
        success, message, ranks, *_ = self._wait(
            manager.check_weights(CheckWeightsReqInput(action="checksum"), None)
        )
        self._check((success, message))
        return [dict(rank["checksums"]) for rank in ranks]

    # -- memory -----------------------------------------------------------------------------------

    def serve_sleep(self) -> None:
        """Give the memory of cache, graphs and weights back to the device."""
        self._engine.release_memory_occupation()

    def serve_wake(self) -> None:
        """Take it again; the weights are garbage until they are published."""
        self._engine.resume_memory_occupation()

    # ---------------------------------------------------------------------------------------------

    @property
    def _has_update_sessions(self) -> bool:
        return self._version >= (0, 5, 21)

    def _wait(self, awaitable: Any) -> Any:
        return self._engine.loop.run_until_complete(awaitable)

    @staticmethod
    def _check(answer: tuple[bool, str]) -> None:
        success, message = answer[:2]
        if not success:
            raise RuntimeError(f"SGLang refused it: {message}")


def _check_plugin() -> None:
    """SGLang finds plugins by the metadata of installed packages."""
    if not any(found.name == "fastrl" for found in entry_points(group="sglang.srt.plugins")):
        raise RuntimeError(
            f"SGLang finds no plugin of FastRL, which algorithm {ALGORITHM}, filters of tokens and "
            f"the hidden states of whole prompts come with: install the package in the environment "
            f"of SGLang (pip install -e .), a PYTHONPATH does not do"
        )


DRAFTER_LOADER = "fastrl.rollout.sglang_host.load_drafter_only"


def load_drafter_only(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> None:
    """SGLang before 0.5.21 offers a publication to both models: the target does not take it."""
    if is_drafter(model):
        model.load_weights(list(named_tensors))


def _raw_response(answer: Mapping[str, Any] | BaseException, num_prompt_tokens: int) -> RawResponse:
    if isinstance(answer, BaseException):
        return _given_up(f"{type(answer).__name__}: {answer}")
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        return _given_up(finish["message"])
    return RawResponse(
        tokens=tuple(answer["output_ids"]),
        logprobs=tuple(entry[0] for entry in meta["output_token_logprobs"]),
        finish_type=finish["type"],
        finish_detail=str(finish.get("matched", "")),
        num_cached_tokens=int(meta["cached_tokens"]),
        steps_by_num_accepted=tuple(meta.get("spec_correct_drafts_histogram", ())),
        hidden_TD=in_order(meta["hidden_states"], num_prompt_tokens)
        if "hidden_states" in meta
        else None,
    )


def _given_up(why: str) -> RawResponse:
    return RawResponse(
        tokens=(),
        logprobs=(),
        finish_type="abort",
        finish_detail=why,
        num_cached_tokens=0,
        steps_by_num_accepted=(),
        hidden_TD=None,
    )


# -- the process ----------------------------------------------------------------------------------


def main() -> None:
    """Answer the trainer until it closes the connection or ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connection", type=int, required=True, help="file descriptor")
    parser.add_argument("--trainer", type=int, required=True, help="process id")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with, args=(arguments.trainer,), daemon=True).start()
    os.set_inheritable(arguments.connection, False)
    connection: Connection[Any, Any] = Connection(arguments.connection)
    multiprocessing.current_process().authkey = connection.recv()
    try:
        _serve(connection)
    except BaseException:
        traceback.print_exc()  # nothing of this process comes after the end of its group
        sys.stderr.flush()
    finally:
        _end_group()


def _serve(connection: Connection[Any, Any]) -> None:
    host: EngineHost | None = None
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            request, arguments = pickle.loads(message)
        except Exception as error:
            traceback.print_exc()
            connection.send((Outcome.UNREAD, f"{type(error).__name__}: {error}"))
            continue
        try:
            host = host or EngineHost()
            answer = getattr(host, f"serve_{request}")(**arguments)
        except Exception as error:
            traceback.print_exc()
            connection.send((Outcome.FAILED, f"{type(error).__name__}: {error}"))
        else:
            connection.send((Outcome.ANSWERED, answer))


def _end_with(trainer: int) -> None:
    """The trainer may be killed while this process is deep in SGLang: its parent changes then."""
    while os.getppid() == trainer:
        time.sleep(_WATCH_INTERVAL_S)
    print("the trainer has ended", file=sys.stderr, flush=True)
    _end_group()


def _end_group() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
