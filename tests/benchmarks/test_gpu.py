"""The script for machines with a GPU runs here in small: every mode, every part."""

import json

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.parts import PARTS, part, run_parts

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("mode", gpu.MODES)
def test_every_mode_runs_in_small(mode, tmp_path, capfd):
    """All parts pass on a CPU, kernels interpreted; both files name all that could run."""
    assert gpu.main([mode, "--device", "cpu", "--out", str(tmp_path)]) == 0, capfd.readouterr().out
    record = json.loads((tmp_path / "gpu.json").read_text())
    wanted = {n for n, p in PARTS.items() if p.mode == mode and not gpu.missing(p)}
    assert set(record[mode]) == wanted
    assert {one["outcome"] for one in record[mode].values()} == {"passed"}
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}: passed" in text for name in wanted)
    assert f"{len(wanted)} of {len(wanted)} parts passed" in capfd.readouterr().out


@pytest.fixture
def added(monkeypatch):
    """Parts of a test's own."""
    monkeypatch.setattr(parts, "PARTS", dict(PARTS))
    return parts.PARTS


def test_a_part_that_fails_leaves_the_others(added, tmp_path, monkeypatch):
    """Its output is kept and returned whole; the others' reports, too; nothing starts too late."""
    for name, seconds in (("good", 60), ("bad", 60), ("slow one", 1)):
        added[name] = parts.Part(name, "smoke", lambda report: None, seconds, alone=False)
    script = tmp_path / "part.py"
    script.write_text(
        "import sys, time\n"
        "name = sys.argv[4]\n"
        "print('output of', name, flush=True)\n"
        "time.sleep(60 if name == 'slow one' else 0)\n"
        "sys.exit(name == 'bad')\n"
    )
    monkeypatch.setattr(parts, "RUN", [str(script), "-m", "benchmarks.gpu"])
    monkeypatch.setattr(parts, "PATIENCE", 1)
    kept = {}
    failed = run_parts(["good", "bad", "slow one"], "cpu", 100, kept.__setitem__, tmp_path / "logs")
    assert set(failed) == {"bad", "slow one"}
    assert "output of bad" in failed["bad"]
    assert kept["good"]["outcome"] == "passed"
    assert kept["slow one"]["outcome"] == "STOPPED after 1 s"
    assert "output of good" in (tmp_path / "logs" / "good.txt").read_text()
    late = run_parts(["good"], "cpu", -1, kept.__setitem__)
    assert "no time left" in late["good"]


def test_parts_enter_themselves(added):
    """A function is a part by its decorator, under its own name."""

    @part("tune", 5, alone=True)
    def some_thing(report):
        """Claim something."""

    found = parts.PARTS["some thing"]
    assert (found.mode, found.seconds, found.alone) == ("tune", 5, True)
    assert found.claim == "Claim something."


def test_what_ran_in_small_is_no_result(added, tmp_path, monkeypatch):
    """Unless told where to, a CPU leaves the files alone that a GPU has written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "RUN", ["-c", "pass"])
    assert gpu.main(["smoke", "--device", "cpu", "--only", "gradients"]) == 0
    assert {*tmp_path.rglob("gpu.*")} == {tmp_path / "out/gpu.json", tmp_path / "out/gpu.md"}


def test_without_a_device_it_says_so(capsys):
    """And names the way to run all the same."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["smoke"])
    assert "--device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["smoke", "--device", "cpu", "--only", "no such"])
    assert "got no such" in capsys.readouterr().err
