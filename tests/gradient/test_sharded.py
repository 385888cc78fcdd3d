"""Sharded factors: exact, one all-reduce, and nothing that puts processes out of step."""

import functools
import re
import subprocess
import sys

import distributed_workers as workers
import pytest
from gloo import run

pytestmark = pytest.mark.slow

ONE = {"c10d.allreduce_": 1}


@functools.cache
def reports(world):
    """What every process reports; all that they do is in one launch."""
    return run(workers.everything, world, timeout=400)


def of(world, what):
    """The reports of one function."""
    return [report[what] for report in reports(world)]


@pytest.mark.covers("C14", "D26", "P26")
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_is_exact(world):
    """Gradients and norms of products sharded in every way are those of the whole ones."""
    for report in of(world, "layouts"):
        assert len(report) >= 4
        for name, dtype, error, *_ in report:
            assert error < (1e-12 if dtype == "torch.float64" else 2e-2), (name, dtype)


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_sends_what_it_has_to(world):
    """One all-reduce of Grams, of whole factors where they cannot be summed, or none at all."""
    for report in of(world, "layouts"):
        for name, _, _, counts, numbers, expected in report:
            assert numbers == expected, name
            assert counts == (ONE if expected else {}), name


@pytest.mark.parametrize("world", [2, 4])
def test_a_bounded_step_of_every_layout_is_exact(world):
    """Of products sharded in every way that of the whole ones; one all-reduce more for it."""
    for report in of(world, "bounded_layouts"):
        for name, error, far, counts, sends in report:
            assert error < 1e-12, name
            assert 1e-3 < far < 0.5, name
            assert counts == ({"c10d.allreduce_": 2} if sends else {}), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", ["bound", "spectron"])
def test_a_step_changes_the_rows_of_its_factor_alone(world, optimizer):
    """Not those of another factor in the same sharded parameter, nor what is of none."""
    assert all(errors[optimizer] < 1e-12 for errors in of(world, "bounded_parts"))


@pytest.mark.covers("C14")
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_training_is_that_of_one_process(world):
    """Steps with ``fully_shard`` give the parameters and losses of one process."""
    for report in of(world, "runs"):
        assert len(report) >= 3
        for name, (parameters, losses) in report.items():
            assert parameters < 1e-9, name
            assert losses < 1e-9, name


@pytest.mark.covers("C14")
def test_grams_of_what_is_no_chain_are_exchanged():
    """The gradients of Tucker, CP and other equations are exact from numbers that are r×r."""
    for report in of(2, "other_structures"):
        for error, counts, numbers, expected in report:
            assert error < 1e-12
            assert counts == ONE
            assert numbers == expected


def test_measurements_are_those_of_whole_factors():
    """Penalty with its autograd, and diagnostics, are right on every process."""
    for penalized, measured in of(2, "measured"):
        assert penalized < 1e-12
        assert measured < 1e-9


@pytest.mark.covers("C14")
def test_a_step_communicates_once():
    """One all-reduce for all products of the mesh, and no other collective."""
    for report in of(2, "collectives"):
        assert report == [ONE] * 4


def test_decay_is_that_of_the_float32_factors():
    """A mixed-precision policy changes the copies that are computed with, not the decay."""
    assert all(error < 1e-5 for error in of(2, "precision"))


@pytest.mark.covers("D26")
def test_copies_are_rounded_alike():
    """Half-precision copies of a part stay bit for bit equal, and the decay acts as it should."""
    found = of(4, "rounding")
    for moved, share, _ in found:
        assert moved > 0
        assert 0.7 < share < 1.3
    assert all(states == found[0][2] for *_, states in found)


@pytest.mark.covers("C14", "D26")
@pytest.mark.parametrize("name", workers.DATA_PARALLEL)
def test_data_parallel_training_is_that_of_one_process(name):
    """All processes keep the same factors bit for bit, those of one process with all the data."""
    assert all(report[name] < 1e-9 for report in of(2, "ordinary"))


def test_a_process_without_gradients_stays_in_step():
    """What it has no gradient for it does not decay; the decay of all else is exact."""
    (error, _), (other_error, held) = of(2, "missing_gradients")
    assert max(error, other_error) < 1e-12
    assert held


def test_nan_of_one_process_is_seen_by_all():
    """In the product that it is in, and in no other."""
    for report in of(2, "not_a_number"):
        assert report == [True] + [False] * (len(report) - 1)


@pytest.mark.covers("P43")
@pytest.mark.parametrize("world", [2, 4])
def test_the_order_of_products_and_meshes_does_not_matter(world):
    """Processes that list their products differently exchange the right ones, mesh by mesh."""
    for error, collectives, meshes in of(world, "other_orders"):
        assert error < 1e-12
        assert collectives == meshes == 1 + world // 2


def test_local_work_is_done_while_waiting():
    """The all-reduce is started before what needs no communication, and waited for after it."""
    for log in of(2, "order_of_work"):
        assert log[0] == "start"
        assert log[-2:] == ["wait", "add"]
        assert set(log[1:-2]) == {"local"}


REFUSED = {
    "partial factor": r"ValueError: name \(tensor\): expected placements Shard or Replicate",
    "half sharded": r"ValueError: name \(tensor\): expected a DTensor, as other factors",
    "two meshes": r"ValueError: name \(tensor\): expected all factors of a product on one mesh",
    "toward a dense weight": r"ValueError: weight: expected whole factors, got sharded ones",
    "partial gradient": r"ValueError: name \(tensor\): expected a gradient .* placed like its",
    "balance": r"ValueError: name \(tensor\) is sharded.*balancing comes before",
    "replay": r"ValueError: name \(tensor\) is sharded.*replaying comes before",
    "other rank": r"RuntimeError: expected the same products.*'uneven'",
    "other values": r"RuntimeError: expected the same numbers in tensor of 'b'",
    "other copies": r"RuntimeError: expected the same numbers in tensor of 'name'",
}


@pytest.mark.covers("C14", "D26")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """On all processes alike, naming the product."""
    for report in of(2, "refusals"):
        assert re.match(f"(?s){REFUSED[name]}", report[name]), report[name]


@pytest.mark.covers("P18")
@pytest.mark.parametrize("world", [2, 4])
def test_layer_by_layer_from_the_meta_device(world):
    """A model that no process ever holds is initialized and trained as a whole one."""
    for difference, after in of(world, "from_meta"):
        assert difference == 0
        assert after < 1e-9


@pytest.mark.covers("C24")
def test_a_killed_process_and_a_restart_from_the_checkpoint(tmp_path):
    """It dies within a step; restarted from the last checkpoint, all end where they would have."""
    with pytest.raises(AssertionError, match=r"exit codes .*-9"):
        run(workers.restarted, 2, str(tmp_path), 0)
    assert run(workers.restarted, 2, str(tmp_path), 1) == [(3, True), (3, True)]


def test_the_import_does_not_bring_in_dtensor():
    """It takes longer than the rest of the package; ordinary tensors do not need it."""
    code = "import sys, frobdecay; print('torch.distributed.tensor' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
