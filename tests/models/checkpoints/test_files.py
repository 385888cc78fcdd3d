"""Files are replaced as a whole or not at all, whoever else writes and whatever happens."""

import errno
import os
import resource
import signal
import socket
import tempfile
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from frobdecay.models.checkpoints import files
from frobdecay.models.checkpoints.files import (
    read_safetensors,
    replacing,
    write_torch,
)
from frobdecay.models.checkpoints.streams import Part, write_stream

needs_safetensors = pytest.mark.skipif(
    find_spec("safetensors") is None, reason="safetensors is not installed"
)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _write(path, text="new"):
    with replacing(path) as file:
        file.write(text.encode())


def write_safetensors(path, tensors):
    """As ``save_factorized`` does."""
    write_stream(path, [Part.of(name, tensor) for name, tensor in tensors.items()], {})


WRITERS = {"safetensors": write_safetensors, "torch": write_torch}


@contextmanager
def _no_space(size=50_000):
    """Files cannot grow beyond a size; to the writer it is what a full disk is."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, write, there):
    """The error is the system's, with the name of the file that was meant."""
    target = tmp_path / "model"
    if there:
        target.write_text("precious")
    with _no_space(), pytest.raises(OSError, match=r"File too large.*model'") as caught:
        write(target, {"w": torch.ones(300, 300)})
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(target))
    assert _names(tmp_path) == (["model"] if there else [])
    assert not there or target.read_text() == "precious"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_space_can_run_out_at_the_last_moment(tmp_path, monkeypatch, write, call):
    """Some file systems say so only when the numbers have to be on the disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model").write_text("precious")
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match=r"No space left.*model'"):
        write(tmp_path / "model", {"w": torch.ones(3)})
    assert _names(tmp_path) == ["model"]
    assert (tmp_path / "model").read_text() == "precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_whatever_interrupts_leaves_what_was_there(tmp_path, error):
    """The error is the one that was raised."""
    _write(tmp_path / "model", "old")

    def interrupted():
        with replacing(tmp_path / "model") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert _names(tmp_path) == ["model"]
    assert (tmp_path / "model").read_text() == "old"


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _loop(path):
    path.symlink_to(path)


# What is no file -> (how it comes to be there, the error).
NO_FILES = {
    "a folder": (lambda path: path.mkdir(), errno.EISDIR),
    "a pipe": (_pipe, errno.EINVAL),
    "a socket": (_socket, errno.EINVAL),
    "a device": (lambda path: path.symlink_to("/dev/null"), errno.EINVAL),
    "a loop": (_loop, errno.ELOOP),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_neither_replaced_nor_read(tmp_path, monkeypatch, case):
    """A pipe would make the reader wait for ever; a device would be gone."""
    make, number = NO_FILES[case]
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    path = tmp_path / "model"
    make(path.relative_to(tmp_path) if case == "a socket" else path)
    before = os.lstat(path)
    with pytest.raises(OSError, match="model'") as caught:
        _write(path)
    assert caught.value.errno == number
    if find_spec("safetensors"):
        with pytest.raises(OSError, match="model'"):
            read_safetensors(path)
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert _names(tmp_path) == ["model"]


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_is_written_through(tmp_path, dangling):
    """Also by way of another link, into another folder."""
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "model"
    if not dangling:
        target.write_text("old")
    (tmp_path / "one").symlink_to("there/model")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    _write(tmp_path / "two")
    assert target.read_text() == "new"
    assert (tmp_path / "one").is_symlink()
    assert (tmp_path / "two").is_symlink()
    assert _names(tmp_path / "there") == ["model"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "name", ["x" * 255, "ж" * 127, os.fsdecode(b"caf\xe9.pt"), " ", "a\nb", ".frobdecay-x", "-f"]
)
def test_every_name_that_the_system_has_is_written(tmp_path, write, name):
    """As long as names can be, in any encoding."""
    write(tmp_path / name, {"w": torch.ones(3)})
    assert _names(tmp_path) == [name]


@needs_safetensors
def test_names_may_be_bytes(tmp_path):
    """As everywhere in Python."""
    name = os.fsencode(tmp_path / "model")
    write_safetensors(name, {"w": torch.ones(3)})
    assert read_safetensors(name)[0]["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["x" * 256, "none/model", "", "a\0b"])
def test_names_that_the_system_has_not_are_its_errors(tmp_path, monkeypatch, name):
    """With the name that was given, not that of something temporary."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError)) as caught:
        _write(name)
    assert getattr(caught.value, "filename", name) == name
    assert _names(tmp_path) == []


@pytest.fixture
def anyones():
    """A folder that every user can reach and write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to become another user"
)


@pytest.mark.cpu("a child of fork has no GPU")
@needs_root
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written_is_refused(anyones, what):
    """A folder without permission, and a file without, though its folder has it."""
    (anyones / "model").write_text("precious")
    (anyones / "model").chmod(0o444 if what == "file" else 0o666)
    anyones.chmod(0o555 if what == "folder" else 0o777)

    def act():
        os.setuid(65534)
        with pytest.raises(PermissionError, match="model'"):
            _write(anyones / "model")

    assert _in_a_child(act) == 0
    assert (anyones / "model").read_text() == "precious"
    assert _names(anyones) == ["model"]


@pytest.mark.cpu("a child of fork has no GPU")
@needs_root
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_its_owner_cannot_read(anyones, write):
    """As the umask wants it."""

    def act():
        os.setuid(65534)
        os.umask(0o777)
        write(anyones / "model", {"w": torch.ones(3)})

    assert _in_a_child(act) == 0
    assert (anyones / "model").stat().st_mode & 0o777 == 0


def _in_a_child(act):
    """How a copy of this process ends that does something."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_permissions_are_those_of_an_open(tmp_path, write):
    """By the umask for a new file, and unchanged for one that is there."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            write(tmp_path / f"{umask}", {"w": torch.ones(3)})
        finally:
            os.umask(old)
        assert (tmp_path / f"{umask}").stat().st_mode & 0o777 == mode
    (tmp_path / "18").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(tmp_path / "18", 4321, 1234)
    before = (tmp_path / "18").stat()
    write(tmp_path / "18", {"w": torch.ones(4)})
    after = (tmp_path / "18").stat()
    kept = ("st_mode", "st_uid", "st_gid")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]


@needs_safetensors
def test_two_savers_at_once_never_show_a_mixture(tmp_path):
    """Threads have one process id, as containers on one disk may have."""
    path, errors, stop = tmp_path / "model", [], threading.Event()
    write_safetensors(path, {"a": torch.zeros(1000), "b": torch.zeros(1000)})

    def save(value):
        content = {name: torch.full((1000,), value) for name in "ab"}
        while not stop.is_set():
            try:
                write_safetensors(path, content)
            except Exception as error:
                errors.append(error)

    savers = [threading.Thread(target=save, args=(float(k),)) for k in range(3)]
    for saver in savers:
        saver.start()
    found = [read_safetensors(path)[0] for _ in range(60)]
    stop.set()
    for saver in savers:
        saver.join()
    assert not errors
    assert all(bool((tensors["a"] == tensors["b"]).all()) for tensors in found)
    assert _names(tmp_path) == ["model"]


@pytest.mark.cpu("a child of fork has no GPU")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_save_leaves_is_gone_with_the_next(tmp_path):
    """But not what a living one has."""
    _write(tmp_path / "model", "old")

    def die():
        with replacing(tmp_path / "model") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert _in_a_child(die) == signal.SIGKILL
    assert (tmp_path / "model").read_text() == "old"
    assert len(_names(tmp_path)) == 2  # nobody was left to tidy up
    with replacing(tmp_path / "one") as file:
        file.write(b"one")
        _write(tmp_path / "two", "two")
    assert _names(tmp_path) == ["model", "one", "two"]


def test_file_systems_without_locks_are_written_to(tmp_path, monkeypatch):
    """Nothing is taken for abandoned there."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with replacing(tmp_path / "one") as file:
        file.write(b"one")
        _write(tmp_path / "two")
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    _write(tmp_path / "three")
    assert _names(tmp_path) == ["one", "three", "two"]
