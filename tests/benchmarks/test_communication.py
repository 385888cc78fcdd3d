"""What decay sends: the benchmark's formulas are what processes call, pretended and real."""

from functools import cache

import pytest
import torch
from gloo import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.communication import LLAMAS, Traffic, cost, counted, main, pretended, sharded_step

pytestmark = pytest.mark.slow

FACTORS = [(16, 12, 3), (7, 16, 2), (3, 5, 4)]  # 7 and 3 rows are uneven, or too few


def count(rank, world):
    """What a process puts into collectives; torch's own count of the calls."""
    mesh = init_device_mesh("cpu", (world,))
    with CommDebugMode() as debug:
        found = counted(FACTORS, mesh)
    found["FSDP"] = sharded_step(FACTORS, mesh)
    counts = {name: (dict(traffic.calls), dict(traffic.bytes)) for name, traffic in found.items()}
    return counts, debug.get_total_counts()


@cache
def counts(world):
    """Of all processes."""
    return run(count, world)


@pytest.mark.parametrize("world", [2, 4])
def test_decay_is_one_all_reduce_of_the_formulas_bytes(world):
    """Σ 2r² float32 numbers, on every process, whatever rows it holds."""
    for found, _ in counts(world):
        assert found["FD"] == ({"all_reduce": 1}, {"all_reduce": cost(FACTORS, world).sums})


@pytest.mark.parametrize("world", [2, 4])
def test_a_bound_sends_the_same_once_more(world):
    """The Grams of what the base has proposed, after those of the factors."""
    for found, _ in counts(world):
        assert found["bound"] == ({"all_reduce": 2}, {"all_reduce": 2 * cost(FACTORS, world).sums})


@pytest.mark.parametrize("world", [2, 4])
def test_gathering_takes_the_formulas_bytes(world):
    """One all-gather a factor, padded to the most rows that a process has."""
    for found, _ in counts(world):
        calls, sent = found["gathering"]
        assert calls == {"all_gather": 2 * len(FACTORS)}
        assert sent["all_gather"] == cost(FACTORS, world).part


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp_takes_the_formulas_bytes(world):
    """Two all-gathers and one reduce-scatter of all parameters, half as wide."""
    for found, _ in counts(world):
        calls, sent = found["FSDP"]
        assert calls == {"all_gather": 2, "reduce_scatter": 1}
        part = cost(FACTORS, world).part // 2
        assert sent == {"all_gather": 2 * part, "reduce_scatter": world * part}


@pytest.mark.parametrize("world", [2, 4])
def test_torch_counts_the_same_calls(world):
    """An agreement, two decays, a bounded one and the gathers, as ``CommDebugMode`` sees them."""
    for found, total in counts(world):
        decay, bounded = (found[name][0]["all_reduce"] for name in ("FD", "bound"))
        assert total == 1 + 2 * decay + bounded + found["gathering"][0]["all_gather"]


@pytest.mark.parametrize("world", [2, 4, 64, 1000])
def test_pretended_processes_call_what_real_ones_do(world):
    """The fake process group sees the formulas' bytes, too."""
    with pretended(world) as mesh:
        found = counted(FACTORS, mesh)
    assert found["FD"].bytes["all_reduce"] == cost(FACTORS, world).sums
    assert found["gathering"].bytes["all_gather"] == cost(FACTORS, world).part


def test_a_collective_that_is_not_known_is_not_counted_as_nothing():
    """Neither as silence nor as something else."""
    with pretended(4), pytest.raises(NotImplementedError, match="broadcast"), Traffic():
        torch.distributed.broadcast(torch.ones(2), 0)


def test_the_script_meets_its_targets(tmp_path):
    """It prints its tables and writes both files; the formulas hold at 64 processes."""
    paths = [tmp_path / "c.json", tmp_path / "c.md"]
    record = main(["--ranks", "8,64", "--json", str(paths[0]), "--markdown", str(paths[1])])
    assert record["verdict"] == "12 of 12 targets met."
    assert set(record["costs"]) == set(LLAMAS)
    assert "| 64 |" in paths[1].read_text(encoding="utf-8")
    assert paths[0].exists()
