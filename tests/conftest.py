"""Shared by all tests: determinism, threads, the hypothesis profile, the table of tolerances.

``FROBDECAY_TEST_DEVICE=cuda pytest tests`` runs the suite on a GPU: that is torch's default device
then. Tests marked ``cpu``, with what they say about a CPU, stay on it.
"""

import os
import tempfile
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings


def interpret_kernels() -> None:
    """Without a GPU, have Triton's kernels run in its interpreter.

    Triton decides that where kernels are defined, ours and its own, and imports some of its own
    at the first launch; any test may be the first to import it, through torch's compiler. So a
    first launch is made here, before all tests. The variable is taken back: it would reach the
    processes that tests start.
    """
    if find_spec("triton") is None or torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from frobdecay.gradient.accumulate import Accumulator
        from frobdecay.product.product import Product

        one = torch.ones(1, 1, device="cpu")
        Accumulator(Product.of(one, one), "triton").accumulate([[one.clone(), None]], [[1.0, 1.0]])
    finally:
        del os.environ["TRITON_INTERPRET"]


# Torch's cache of compiled graphs takes those for another instruction set, and computes nonsense.
kind = f"{torch.backends.cpu.get_cpu_capability()}-{os.environ.get('ONEDNN_MAX_CPU_ISA', '')}"
name = f"torchinductor-{os.environ.get('USER', '')}-{kind.replace(' ', '')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), name))

interpret_kernels()
DEVICE = os.environ.get("FROBDECAY_TEST_DEVICE")
if DEVICE is not None:
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # tolerances expect float32's precision

settings.register_profile(
    "frobdecay",
    deadline=None,  # shared machines stall; a deadline would make the tests flaky
    derandomize=True,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("frobdecay")


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, on as many threads as are asked for: one."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FROBDECAY_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose the device before any fixture makes a tensor, whatever the test before left."""
    torch.set_default_device(None if item.get_closest_marker("cpu") else DEVICE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Have the tests of one row of ``test_capabilities.py`` run alone."""
    parser.addoption("--covers", metavar="ROW", help="run tests that are marked with this row only")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of the integration matrix, ``third_party/matrix.py``."""
    config.addinivalue_line(
        "markers", "integration(row, column, refused): the cell of the matrix that the test fills"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose by ``--covers``; have cells written beside outcomes in the file of ``--junitxml``."""
    if row := config.getoption("--covers", None):
        marked = {item for item in items if any(row in m.args for m in item.iter_markers("covers"))}
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = [item for item in items if item in marked]
    for item in items:
        for mark in reversed(list(item.iter_markers("integration"))):  # the closest says it last
            item.user_properties += mark.kwargs.items()


@pytest.fixture
def alone():
    """A process group of this process only, without threads.

    Those of gloo may wait for the interpreter's lock while what holds it waits for their end.
    """
    distributed = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
