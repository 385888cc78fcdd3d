"""Files of tensors: written as a whole or not at all, read without running anything."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # no locks as POSIX has them; what a killed save leaves then stays
    fcntl = None  # type: ignore[assignment]

FilePath = str | os.PathLike[str]

# Note [a folder for each save]
# A save writes into a folder of its own beside what it is to replace: no two saves meet, and the
# own name of the file or the folder, however long, can be used. The folder holds a lock while the
# save lives. A killed save cannot clean up, so the next one in the same place does: folders whose
# lock can be taken. A lock gets its name when it is locked already, so that no new folder looks
# abandoned.
_PREFIX, _LOCK = ".frobdecay-", ".frobdecay-lock"


@contextmanager
def replacing(path: FilePath) -> Iterator[Any]:
    """A binary file to write to, which replaces ``path`` in one step if nothing fails.

    Links are followed, and the file keeps its owner and its permissions; a new one gets those that
    ``open`` would give it. The numbers are on the disk before the old ones are gone.

    Raises:
        OSError: the file cannot be written, for want of space or of permission, or because it is a
            folder or a device. What was there is there still.
    """
    try:
        target = Path(os.path.realpath(os.fsdecode(path)))
        old = _writable(target)
        with own_folder(target.parent) as folder:
            temporary = folder / target.name
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if old is not None:
                if hasattr(os, "chown"):
                    with suppress(PermissionError):
                        os.chown(temporary, old.st_uid, old.st_gid)
                temporary.chmod(stat.S_IMODE(old.st_mode))
            os.replace(temporary, target)
        sync(target.parent)
    except Exception as error:
        found = _os_error(error)
        if found is None:
            raise
        raise OSError(found.errno, found.strerror, os.fspath(path)) from error


def _writable(target: Path) -> os.stat_result | None:
    """What is known of the file that is to be replaced; None if there is none."""
    try:
        old = check_regular(target)
    except FileNotFoundError:
        return None
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))
    return old


def check_regular(path: FilePath) -> os.stat_result:
    """Refuse what is no file: reading a pipe or replacing a device would do harm.

    Raises:
        OSError: there is none, or something else.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        what = "a pipe, a socket or a device, but expected a regular file"
        raise OSError(errno.EINVAL, what, os.fspath(path))
    return found


@contextmanager
def readable(path: FilePath) -> Iterator[str]:
    """A name of a file that every library can open: some know no names but in UTF-8.

    Raises:
        OSError: the file cannot be read, or is none.
    """
    check_regular(path)
    with open(path, "rb") as file:
        name = os.fsdecode(path)
        yield name if _is_utf8(name) else f"/dev/fd/{file.fileno()}"


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder for one save; see Note [a folder for each save]."""
    _clean(parent)
    made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True)
    with made as name:
        os.chmod(name, 0o700)  # whatever the umask
        with Path(name, "unlocked").open("wb") as lock:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rename(lock.name, Path(name, _LOCK))
            yield Path(name)


def _clean(parent: Path) -> None:
    """Remove the folders of saves that were killed."""
    for folder in parent.glob(f"{_PREFIX}*") if fcntl is not None else ():
        with suppress(OSError), Path(folder, _LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's content on the disk, and the names in a folder where the system can."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        # Windows writes out what is open for writing.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind a writer's own words, if there is one.

    ``torch.save`` raises a RuntimeError over the OSError of the file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def write_torch(path: FilePath, content: Any) -> None:
    """``torch.save`` into a file that is replaced as a whole.

    Raises:
        OSError: as ``replacing``.
    """
    with replacing(path) as file:
        torch.save(content, file)


def new_figure(what: str, width: float, height: float) -> Any:
    """An empty figure of matplotlib for what is to be drawn, of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{what} needs matplotlib: pip install matplotlib, or frobdecay[plot]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: FilePath, figure: Any) -> None:
    """Save a figure of matplotlib; the file's ending decides the format.

    Raises:
        OSError: as ``replacing``.
        ValueError: an ending that matplotlib does not know.
    """
    with replacing(path) as file:
        figure.savefig(file, format=Path(file.name).suffix[1:] or None, dpi=150)


def read_safetensors(path: FilePath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and the metadata of its header.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be opened.
        ValueError: it is not a safetensors file, or damaged.
    """
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "safetensors files need safetensors: pip install safetensors, or frobdecay[cli]"
        ) from error
    try:
        with (
            readable(path) as name,
            safetensors.safe_open(name, framework="pt", device="cpu") as file,
        ):
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error
