"""Runs a function on several processes at once, started and told of one another as by torchrun."""

import importlib
import inspect
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_S = 240

_ROOT = Path(__file__).parents[2]


def run_ranks(work: Callable, folder: Path, *arguments: object, num_ranks: int = 2) -> list:
    """What `work(*arguments)`, a function of a module, returns on each rank; gloo is set up.

    Raises AssertionError with all output where a rank raises or does not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments").write_bytes(pickle.dumps(arguments))
    file = Path(inspect.getfile(work)).relative_to(_ROOT)  # its module's name, if in no package
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "OMP_NUM_THREADS": "1",
        }
        with (folder / f"output{rank}").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "tests.rollout.ranks",
                        ".".join(file.with_suffix("").parts),
                        work.__name__,
                        str(folder),
                    ],
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        statuses = [one.wait(max(deadline - time.monotonic(), 0.1)) for one in processes]
    except subprocess.TimeoutExpired:
        statuses = None
    finally:
        for one in processes:
            one.kill()
            one.wait()
    outputs = "\n".join((folder / f"output{rank}").read_text() for rank in range(num_ranks))
    assert statuses == [0] * num_ranks, f"exit statuses {statuses}:\n{outputs}"
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def raised(work: Callable[[], object]) -> tuple[str, str]:
    """Type and message, notes included, of what `work` raises; it must raise."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, "".join(traceback.format_exception_only(error))
    raise AssertionError("nothing was raised")


def main(module: str, name: str, folder: str) -> None:
    """One rank."""
    sys.path.append(str(_ROOT / "scripts"))  # as pytest's pythonpath has it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    arguments = pickle.loads((Path(folder) / "arguments").read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    (Path(folder) / f"result{dist.get_rank()}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's own threads sometimes abort the process while the interpreter is torn down.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
