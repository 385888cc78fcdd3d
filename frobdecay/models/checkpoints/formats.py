"""What a file is, by its first bytes: people hand over what they have, and want to be told."""

from __future__ import annotations

import json
import re
import zipfile

from frobdecay.models.checkpoints.files import FilePath, check_regular

SAFETENSORS = "a safetensors file"
ZIP = "a file of torch.save"
PICKLE = "a pickle, as torch.save wrote them before it wrote archives"

# First bytes -> what it is. The first that fits is taken.
_BYTES: tuple[tuple[str, str], ...] = (
    (r"\Z", "an empty file"),
    (r".{8}\{", SAFETENSORS),
    (r"PK(\x03\x04|\x05\x06)", ZIP),
    (r"\x80\x02", PICKLE),
    (r"\x80[\x03-\x05]", "a pickle of another kind; torch.save the weights that are in it"),
    (r"version https://git-lfs", "a pointer of Git LFS in the place of the file: git lfs pull"),
    (r"\s*<", "a page of HTML or XML, maybe a download that failed"),
    (r"\x1f\x8b", "compressed by gzip; unpack it first"),
    (r"BZh[1-9]", "compressed by bzip2; unpack it first"),
    (r"\xfd7zXZ", "compressed by xz; unpack it first"),
    (r"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (r"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (r".{257}ustar", "a tar archive; unpack it first"),
    (r"\x93NUMPY", "an array of NumPy (.npy)"),
    (r"\x89HDF", "an HDF5 file, as Keras writes them"),
    (r"GGUF", "a GGUF file, as llama.cpp reads them"),
    (r".{4}TFL3", "a model of TensorFlow Lite"),
    (r"\x08[\x01-\x20](\x12|\x1a|\x22|:)", "a model in ONNX, or another protocol buffer"),
    (r"\A[\t\n\r -~\x80-\xff]*\Z(?<=[\n -~])", "text"),
)


def recognized(path: FilePath) -> str:
    """What a file is, in words; three of them are names.

    Returns:
        SAFETENSORS, ZIP or PICKLE; or a description of something that no command reads.

    Raises:
        OSError: the file cannot be read.
        ValueError: an archive that is damaged.
    """
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.decode("latin-1")
    if re.match(r"\s*[{\[]", text) and "\0" not in text:
        return _json(path)
    found = next((what for sign, what in _BYTES if re.match(sign, text, re.S)), "something unknown")
    return _archive(path) if found == ZIP else found


def _json(path: FilePath) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError):
        return "text"
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict):
        return "JSON"
    files = sorted({str(name) for name in table.values()})
    return (
        f"the index of a model in {len(files)} files; give its folder, or one of those: {files[:8]}"
    )


def _archive(path: FilePath) -> str:
    """Archives of other things, and those that unpack to more than they are, are named."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"a damaged or truncated archive: {error}") from error
    names = [entry.filename for entry in entries]
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return "a TorchScript file; save torch.jit.load(...).state_dict() by torch.save"
    if "archive_format" in inside or "serialized_exported_program.json" in names:
        return "a program of torch.export (.pt2); save its state_dict by torch.save"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz)"
    if "data.pkl" not in inside:
        return "a zip archive of something else than torch.save's"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "a compressed archive, which torch.save does not write; unpack it, and pack it plain"
    return ZIP
