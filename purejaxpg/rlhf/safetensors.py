"""Files of tensors in the format "safetensors", which holds bytes and no code.

A file is the length of its header (8 bytes, little-endian), the header in JSON (of each tensor its
type, shape and place) and the bytes of the tensors. The package `safetensors` reads no bfloat16
into NumPy arrays, and most published weights are bfloat16. The format is small enough to be read
here, with jax's own type.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from purejaxpg import InputError, disk
from purejaxpg import config as configs

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}  # fmt: skip
LENGTH = 8  # bytes that hold the length of the header


class Tensor(Protocol):
    """A tensor of a file; its values are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    def array(self) -> np.ndarray:
        """Return the values."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the header of a file describes it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file
    stop: int

    def array(self) -> np.ndarray:
        """Return the values, which stay in the file until they are used.

        Raises:
            InputError: they are of a type that models are not made of.
        """
        known = ", ".join(DTYPES)
        about = f"{self.path}: tensor {self.name!r} must"
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise InputError(f"{about} have one of the types {known}, but has {self.dtype!r}.")
        size = dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        configs.require(
            self.stop - self.start == size,
            f"{about} have {size} bytes for its shape {list(self.shape)}, but has "
            f"{self.stop - self.start}.",
        )
        mapped = np.memmap(self.path, np.uint8, "r", self.start, size) if size else np.zeros(0)
        return mapped.view(dtype).reshape(self.shape)


def read(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a model's folder by their names, from one file or several.

    Args:
        folder: with `model.safetensors`, or with `model.safetensors.index.json` and the files that
            it names.

    Raises:
        InputError: a file is missing, cut short, or not as the format says.
    """
    if (folder / SINGLE).is_file():
        return dict(_read_file(folder / SINGLE))
    index = folder / INDEX
    configs.require(
        index.is_file(), f"{folder} must have {SINGLE} or {INDEX}, but has {_listed(folder)}."
    )
    placed: Any = read_json(index).get("weight_map")
    configs.require(
        isinstance(placed, dict) and all(isinstance(name, str) for name in placed.values()),
        f"{index} must have 'weight_map', which gives the file of each tensor.",
    )
    tensors: dict[str, Stored] = {}
    for name in sorted(set(placed.values())):
        configs.require(
            Path(name).name == name and (folder / name).is_file(),
            f"{folder} must have {name!r}, a file that {INDEX} names, but has {_listed(folder)}.",
        )
        tensors |= dict(_read_file(folder / name))
    for name, file in placed.items():
        configs.require(name in tensors, f"{folder / file} must have the tensor {name!r}.")
    return tensors


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into one file, whole or not at all.

    Raises:
        FaultError: the disk is full, for example.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, array in arrays.items():
        about = {"dtype": names[array.dtype], "shape": list(array.shape)}
        header[name] = {**about, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH)  # so that the tensors begin at a multiple of it
    with disk.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: it is missing or is no object in JSON.
    """
    configs.require(path.is_file(), f"{path.parent} must have {path.name}, but has none.")
    try:
        with disk.faults("read", path):
            found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be an object in JSON: {error}.") from error
    configs.require(isinstance(found, dict), f"{path} must be an object in JSON, but is {found!r}.")
    return dict(found)


def _read_file(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the names and places of the tensors in one file."""
    with disk.faults("read", path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(LENGTH), "little")
        configs.require(
            LENGTH + length <= size,
            f"{path} must be a whole file of safetensors, but is cut short or something else: its "
            f"header should have {length} bytes, and {max(0, size - LENGTH)} follow.",
        )
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        found = [_stored(path, LENGTH + length, *entry) for entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} must begin with a header of safetensors: {error!r}.") from error
    end = max((tensor.stop for tensor in found), default=0)
    configs.require(
        end <= size,
        f"{path} must be a whole file of safetensors, but is cut short: its header describes "
        f"{end} bytes, and it has {size}.",
    )
    yield from ((tensor.name, tensor) for tensor in found)


def _stored(path: Path, base: int, name: str, about: Mapping[str, Any]) -> Stored:
    start, stop = (int(at) for at in about["data_offsets"])
    shape = tuple(int(length) for length in about["shape"])
    if not 0 <= start <= stop or min(shape, default=0) < 0:
        raise ValueError(f"the place or shape of {name!r} is negative")
    return Stored(path, name, str(about["dtype"]), shape, base + start, base + stop)


def _listed(folder: Path) -> str:
    """Name the files of weights in a folder, for a message."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")
    )
    return ", ".join(names) or "no weights at all"
