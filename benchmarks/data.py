"""Image sets that fit into memory, from what people have on disk.

    digits                    scikit-learn's 8×8 digits, embedded, no download (the default)
    FILE.npz                  x_train, y_train, x_test, y_test
    FILE.npz                  packed JPEGs: jpeg_train, off_train, y_train, jpeg_test, …
    DIRECTORY, FILE.tar.gz    the python version of CIFAR-10 or CIFAR-100
    torchvision:NAME          a data set of torchvision, downloaded by it if need be

A relative path that does not exist here is looked up under the environment's FROBDECAY_DATA.
"""

from __future__ import annotations

import inspect
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.cifar import read_archive

__all__ = ["ImageData", "load"]

_SHUFFLE = 0  # seed of the split: a property of the data, not of a run
_VALIDATE = 300  # images to validate with, at least: one is then worth a third of a percent


@dataclass(frozen=True)
class ImageData:
    """Images and labels for training, validation and test.

    Attributes:
        name: for tables.
        note: what a reader of a figure has to know, or "".
        natural: photographs, which may be flipped and shifted for augmentation.
        classes: number of labels.
        train, val, test: images (N, C, H, W) and labels (N,) each.
        mean, std: of the training images by channel, (1, C, 1, 1).
    """

    name: str
    note: str
    natural: bool
    classes: int
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: Tensor
    std: Tensor

    def to(self, device: torch.device | str) -> ImageData:
        """Move all tensors to a device."""
        moved = {
            key: tuple(tensor.to(device) for tensor in getattr(self, key))
            for key in ("train", "val", "test")
        }
        return replace(self, **moved, mean=self.mean.to(device), std=self.std.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Bring images to mean 0 and variance 1 by channel, float32."""
        return (images.float() - self.mean) / self.std


@dataclass(frozen=True)
class _Arrays:
    """What a file held."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    note: str = ""


def load(source: str = "digits", *, limit: int | None = None, side: int | None = None) -> ImageData:
    """Load a data set and split it.

    For validation a tenth as many images as are trained on are held out of the training set; 300
    at least, where that is less than a quarter of it.

    Args:
        source: one of the forms in the module's docstring.
        limit: train on so many images; all unless given.
        side: average the images down to so many pixels a side; as they are unless given.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: torchvision is asked for and not installed.
        ValueError: the file holds something else; nothing in it was run.

    Example:
        >>> data = load("digits")
        >>> data.name, [tuple(images.shape) for images, _ in (data.train, data.val, data.test)]
        ('digits', [(997, 1, 8, 8), (300, 1, 8, 8), (500, 1, 8, 8)])
    """
    if limit is not None and limit < 2:
        raise ValueError(f"expected a limit of at least 2 images, got {limit}")
    if source == "digits":
        return _split("digits", _digits(), limit, side, natural=False)
    if source.startswith("torchvision:"):
        name = source.partition(":")[2]
        return _split(name, _torchvision(name), limit, side)
    path = _find(source)
    if path.is_dir() or tarfile.is_tarfile(path):
        (x_train, y_train), (x_test, y_test) = read_archive(path)
        arrays = _Arrays(x_train, y_train, x_test, y_test)
    elif zipfile.is_zipfile(path):
        arrays = _npz(path)
    else:
        raise ValueError(f"expected an .npz file or a CIFAR archive, got {path}")
    try:
        return _split(_name(path), arrays, limit, side)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _find(source: str) -> Path:
    """The path itself, else the one below FROBDECAY_DATA."""
    root = os.environ.get("FROBDECAY_DATA")
    tried = [Path(source).expanduser()]
    if root and not tried[0].is_absolute():
        tried.append(Path(root).expanduser() / source)
    for path in tried:
        if path.exists():
            return path
    hint = "" if root else "; FROBDECAY_DATA may name a directory to look in"
    raise FileNotFoundError(f"no data set at {' or '.join(map(str, tried))}{hint}")


def _name(path: Path) -> str:
    return path.name.removesuffix(".npz").removesuffix(".gz").removesuffix(".tar")


# --- splitting ----------------------------------------------------------------------------------


def _split(
    name: str,
    arrays: _Arrays,
    limit: int | None,
    side: int | None = None,
    natural: bool | None = None,
) -> ImageData:
    x, y = _images(arrays.x_train), _labels(arrays.y_train)
    x_test, y_test = _images(arrays.x_test), _labels(arrays.y_test)
    if len(x) != len(y) or len(x_test) != len(y_test) or x.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            "expected as many labels as images and one image size, got "
            f"{tuple(x.shape)} with {len(y)} and {tuple(x_test.shape)} with {len(y_test)} labels"
        )
    count = limit or len(x)
    held_out = min(max(count // 10, _VALIDATE), len(x) // 4)
    count = min(count, len(x) - held_out)
    if held_out < 1:
        raise ValueError(f"expected at least 4 images to train on and validate with, got {len(x)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SHUFFLE))
    train, val = order[:count], order[count : count + held_out]
    x_val, x_test = _averaged(x[val], side), _averaged(x_test, side)
    x_train = _averaged(x[train], side)
    pixels = x_train.double()
    return ImageData(
        name=name,
        note=arrays.note,
        natural=x.shape[1] == 3 if natural is None else natural,
        classes=int(max(y.max(), y_test.max())) + 1,
        train=(x_train, y[train]),
        val=(x_val, y[val]),
        test=(x_test, y_test),
        mean=pixels.mean((0, 2, 3), keepdim=True).float(),
        std=pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-8).float(),
    )


def _images(x: np.ndarray) -> Tensor:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W)."""
    if not (x.ndim in (3, 4) and len(x) and x.dtype.kind in "uif"):
        raise ValueError(f"expected images (N, H, W) or (N, H, W, C), got {x.dtype} {x.shape}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3):
        raise ValueError(f"expected images with 1 or 3 channels, got {x.shape}")
    kept = x if x.dtype == np.uint8 else x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(kept))


def _averaged(images: Tensor, side: int | None) -> Tensor:
    """Each pixel the mean of a square of pixels."""
    if side is None:
        return images
    height, width = images.shape[2:]
    if side < 1 or height % side or width % side:
        raise ValueError(f"expected a side that divides images of {height}×{width}, got {side}")
    return avg_pool2d(images.float(), (height // side, width // side))


def _labels(y: np.ndarray) -> Tensor:
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "ui" or not len(y) or y.min() < 0:
        raise ValueError(f"expected labels (N,) of integers from 0, got {y.dtype} {y.shape}")
    return torch.from_numpy(y.astype(np.int64))


# --- sources ------------------------------------------------------------------------------------


def _digits() -> _Arrays:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(_SHUFFLE).permutation(len(x))
    x, y = x.reshape(-1, 8, 8)[order].astype(np.float32), y[order]
    return _Arrays(x[500:], y[500:], x[:500], y[:500])


def _npz(path: Path) -> _Arrays:
    plain = ("x_train", "y_train", "x_test", "y_test")
    packed = ("jpeg_train", "off_train", "y_train", "jpeg_test", "off_test", "y_test")
    with np.load(path, allow_pickle=False) as file:
        keys = set(file.files)
        try:
            if keys.issuperset(packed):
                return _unpack(*(file[key] for key in packed))
            if keys.issuperset(plain):
                return _Arrays(*(file[key] for key in plain))
        except ValueError as error:  # an object array: numpy would have to unpickle it
            raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path}: expected the arrays {', '.join(plain)} or {', '.join(packed)}, got {sorted(keys)}"
    )


def _unpack(
    jpeg_train: np.ndarray,
    off_train: np.ndarray,
    y_train: np.ndarray,
    jpeg_test: np.ndarray,
    off_test: np.ndarray,
    y_test: np.ndarray,
) -> _Arrays:
    x_train, quality = _decode(jpeg_train, off_train)
    x_test, _ = _decode(jpeg_test, off_test)
    note = f"images are JPEG {quality}, not the original pixels"
    return _Arrays(x_train, y_train, x_test, y_test, note)


def _decode(packed: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, str]:
    """Decode image i from the bytes offsets[i]:offsets[i + 1]."""
    from PIL import Image

    if packed.dtype != np.uint8 or packed.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(f"expected packed bytes and offsets, got {packed.dtype} {packed.shape}")
    if offsets[0] < 0 or offsets[-1] > len(packed) or (np.diff(offsets) <= 0).any():
        raise ValueError("expected offsets that ascend within the packed bytes")
    data, quality, images = packed.tobytes(), "", []
    for start, stop in pairwise(offsets):
        with Image.open(io.BytesIO(data[start:stop]), formats=["JPEG"]) as image:
            quality = quality or _quality(getattr(image, "quantization", {}))
            images.append(np.asarray(image.convert("RGB")))
    if len({image.shape for image in images}) > 1:
        raise ValueError("expected images of one size")
    return np.stack(images), quality


def _quality(tables: dict[int, Any]) -> str:
    """Libjpeg's quality from the mean of the luminance table, as its scaling formula gives it."""
    if not tables or not len(tables[0]):
        return "compressed"
    scale = 100 * float(np.mean(tables[0])) / 57.625  # the mean of the standard's table
    return f"quality {round((200 - scale) / 2 if scale <= 100 else 5000 / scale)}"


def _torchvision(name: str) -> _Arrays:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"torchvision:{name} needs torchvision: pip install torchvision, or give the file"
        ) from error
    kind: Any = getattr(datasets, name, None)
    if kind is None:
        raise ValueError(f"expected the name of a torchvision data set, got {name!r}")
    root = os.environ.get("FROBDECAY_DATA") or Path.home() / ".cache" / "frobdecay"
    (x_train, y_train), (x_test, y_test) = (_half(kind, root, train) for train in (True, False))
    return _Arrays(*map(np.asarray, (x_train, y_train, x_test, y_test)))


def _half(kind: Any, root: str | Path, train: bool) -> tuple[list[np.ndarray], list[int]]:
    """Images and labels of the training or the test half; SVHN and STL10 name theirs."""
    named = "split" in inspect.signature(kind).parameters
    half = {"split": "train" if train else "test"} if named else {"train": train}
    pairs = [(np.asarray(image), label) for image, label in kind(root, download=True, **half)]
    return [image for image, _ in pairs], [label for _, label in pairs]
