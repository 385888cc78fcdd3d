"""Run a function in several processes that are joined by gloo, and collect what it returns."""

import faulthandler
import multiprocessing
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Processes are forked from a server that has these: to import them takes seconds of each.
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "frobdecay",
)


def run(worker: Callable[..., Any], world: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call ``worker(rank, world, *args)`` in ``world`` new processes, one thread each.

    The default process group is initialized when the worker is called. Processes that wait for
    one that failed are ended.

    Args:
        worker: a function of an importable module.
        world: number of processes.
        args: what pickles.
        timeout: seconds for everything, the start of the interpreters included.

    Returns:
        The workers' results by rank: what ``torch.load(weights_only=True)`` can read.

    Raises:
        AssertionError: a worker raised or died, with its traceback, or the time was up, with the
            places where the workers were.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        processes = [
            context.Process(target=_main, args=(worker, rank, world, directory, timeout, args))
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, time.monotonic() + timeout + 2)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        errors = sorted(directory.glob("error*"))
        report = "\n".join(f"{path.name}:\n{path.read_text()}" for path in errors)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, f"exit codes {codes}\n{report}"
        return [torch.load(directory / f"result{r}", weights_only=True) for r in range(world)]


def _wait(processes: list[Any], deadline: float) -> None:
    """Return when all are done, or one has failed, or the time is up."""
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if all(code is not None for code in codes) or any(codes):
            return
        time.sleep(0.02)


def _main(
    worker: Callable[..., Any],
    rank: int,
    world: int,
    directory: pathlib.Path,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    """Be one of the processes. Never return: gloo's threads may abort an orderly exit."""
    code = 1
    report = directory / f"error{rank}"
    try:
        with report.open("w") as file:
            faulthandler.enable(file)
            faulthandler.dump_traceback_later(timeout, file=file)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.set_num_threads(1)
            torch.manual_seed(0)
            store = f"file://{directory / 'rendezvous'}"
            dist.init_process_group("gloo", store, rank=rank, world_size=world)
            torch.save(worker(rank, world, *args), directory / f"result{rank}")
            dist.barrier()  # none leaves while another still talks to it
            faulthandler.cancel_dump_traceback_later()
        report.unlink()
        code = 0
    except BaseException:
        report.write_text(traceback.format_exc())
    finally:
        os._exit(code)
