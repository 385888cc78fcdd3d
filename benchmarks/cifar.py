"""The python version of CIFAR-10 and CIFAR-100, read without trusting the archive.

Its batches are pickles, and a pickle can call anything when it is loaded. Here it may call
numpy's constructors of arrays, nothing else; and nothing is extracted to disk.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Half", "read_archive"]

Half = tuple[np.ndarray, np.ndarray]
"""Images (N, 3, 32, 32) and labels (N,)."""

_CIFAR = {
    "CIFAR-10": (tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch", b"labels"),
    "CIFAR-100": (("train",), "test", b"fine_labels"),
}


def read_archive(path: Path) -> tuple[Half, Half]:
    """Read the training and the test half.

    Args:
        path: the directory, or the .tar or .tar.gz file.

    Raises:
        ValueError: it holds something else.
    """
    files = dict(_in_directory(path) if path.is_dir() else _in_tar(path))
    for train, test, label in _CIFAR.values():
        if test in files and set(train) <= set(files):
            images, labels = zip(*(_batch(files[n], n, label) for n in train), strict=True)
            return (np.concatenate(images), np.concatenate(labels)), _batch(
                files[test], test, label
            )
    raise ValueError(
        f"{path}: expected the files of CIFAR-10 (data_batch_1 … data_batch_5, test_batch) or of "
        f"CIFAR-100 (train, test), got {sorted(files) or 'none of them'}"
    )


def _names() -> set[str]:
    return {name for train, test, _ in _CIFAR.values() for name in (*train, test)}


def _in_directory(path: Path) -> Iterator[tuple[str, bytes]]:
    for where in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        for name in sorted(_names()):
            if (where / name).is_file():
                yield name, (where / name).read_bytes()


def _in_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """The batches by the last part of their name, read without extracting anything."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name).name
            file = archive.extractfile(member) if member.isfile() and name in _names() else None
            if file is not None:
                yield name, file.read()


class _ArraysOnly(pickle.Unpickler):
    """A pickle can call anything; the CIFAR archives need numpy's constructors only."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the constructor, from the table and by no import."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return self.ALLOWED[module, name]


def _batch(content: bytes, name: str, label: bytes) -> Half:
    """Images (N, 3, 32, 32) and labels (N,) of one pickled batch."""
    try:
        found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(
            f"{name} is not a CIFAR batch, and nothing in it was run: {error}"
        ) from None
    if not isinstance(found, dict) or not {b"data", label} <= set(found):
        raise ValueError(f"expected {name} to hold 'data' and {label.decode()!r}, it does not")
    images, labels = found[b"data"], np.asarray(found[label])
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError(f"expected {name} to hold images (N, 3072), got {np.shape(images)}")
    return images.reshape(-1, 3, 32, 32), labels
