"""Tensors out of a torch.save file that others wrote, without running anything of it.

A pickle is a program: it names functions and calls them.  Here every name it asks for, torch's
included, becomes an inert `Node` that only remembers its arguments; nothing is imported and
nothing called.  What the file holds can then be looked at, and a tensor's bytes are read when
they are wanted, so that the rest of a large file never enters memory.

torch.load with such classes as its pickle_module would be shorter, but runs more than the pickle:
an archive with TorchScript in it goes to torch.jit.load, whose `__setstate__` may write any file
(a test shows it), and a tar of torch's oldest format is unpacked.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from equimini.utils.errors import UserError, first_line

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's format before 1.6
DTYPES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
          "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
          "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
          "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
          "Untyped": torch.uint8}  # by the name of their storage class


class Node(dict):
    """Stands for an object or a class of the file: keeps arguments and items, does nothing."""

    path = ""  # "module.name"
    __hash__, __eq__, __ne__ = object.__hash__, object.__eq__, object.__ne__

    def __new__(cls, *args: Any, **kwargs: Any) -> Node:
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Node:
        return Node()

    def __setstate__(self, state: Any) -> None:
        """An object's state is of no interest."""

    def append(self, item: Any) -> None:
        """Nor are the items of a list, a set or a queue."""

    extend = add = append


class Stored(NamedTuple):  # a tuple, because a pickle cannot change one
    """A tensor in the file, or a storage of tensors: where its elements are, none read yet."""

    dtype: torch.dtype | None
    key: str  # of its storage
    numel: int  # of its storage
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class _Unpickler(pickle.Unpickler):
    """Rebuilds containers, numbers and strings; everything else becomes a Node."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, torch.dtype | None] = {}

    def find_class(self, module: str, name: str) -> type[Node]:
        return type("Node", (Node,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # ("module", class, source file, source) of a pickled nn.Module
            return pid[1]
        name, kind, key, _, numel, *view = pid  # _: the device it was on
        if name != "storage" or view not in ([], [None]):
            raise pickle.UnpicklingError("it holds a view of a storage, as torch before 0.4 wrote")
        module, _, name = getattr(kind, "path", "").rpartition("Storage")[0].rpartition(".")
        dtype = DTYPES.get(name) if module in ("torch", "torch.storage") else None
        self.storages[str(key)] = dtype
        return Stored(dtype, str(key), numel)


def stored(value: Any) -> Stored | None:
    """The tensor that a value of the file stands for; None if it is no plain, sound tensor."""
    while isinstance(value, Node):
        match value.path, value.args:
            case ("torch._utils._rebuild_parameter"
                  | "torch._utils._rebuild_parameter_with_state"), (data, *_):
                value = data
            case "torch._tensor._rebuild_from_type_v2", (type() as make, _, tuple(args), *_):
                value = make(*args)  # a Node again: make is a class of Nodes
            case ("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor"), (
                    Stored() as storage, offset, tuple(shape), tuple(stride), *_):
                tensor = storage._replace(offset=offset, shape=shape, stride=stride)
                return tensor if _sound(tensor) else None
            case _:
                return None
    return None


def _sound(tensor: Stored) -> bool:
    """Whether the dtype is known, and the elements lie inside the storage, each its own."""
    numbers = (tensor.numel, tensor.offset, *tensor.shape, *tensor.stride)
    if tensor.dtype is None or len(tensor.shape) != len(tensor.stride) or not all(
            type(n) is int and 0 <= n < 2**62 for n in numbers):
        return False
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))
    return 0 in tensor.shape or (tensor.offset + last < tensor.numel
                                 and math.prod(tensor.shape) <= tensor.numel)


class ForeignFile:
    """A checkpoint written by torch.save (either format), opened for reading its tensors.

    `content` is what was saved: dicts, lists, numbers and strings, and Nodes in place of all else;
    `stored` tells which of the Nodes are tensors, `read` fetches one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._latest = ("", bytearray())  # key and bytes of the storage that was read last
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        try:
            is_zip = self._file.read(4) == b"PK\x03\x04"
            self._file.seek(0)
            self.content = self._open_zip() if is_zip else self._open_legacy()
        except Exception as error:  # a damaged pickle can raise anything
            self._file.close()
            raise UserError(f"{path} is damaged, or no file of torch.save: "
                            f"{first_line(error)}") from None

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _open_zip(self) -> Any:
        """Format since torch 1.6: data.pkl, and one uncompressed entry per storage."""
        self._zip = zipfile.ZipFile(self._file)
        names = self._zip.namelist()
        root = next((name for name in names if name.endswith("/data.pkl")), "")[:-len("data.pkl")]
        if not root:
            raise ValueError("no data.pkl in the archive")
        if f"{root}byteorder" in names and self._zip.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

        self._fetch = lambda key: self._zip.read(f"{root}data/{key}")
        with self._zip.open(f"{root}data.pkl") as file:
            return _Unpickler(file).load()

    def _open_legacy(self) -> Any:
        """Format before torch 1.6: five pickles, then each storage as a count and its bytes."""
        if _Unpickler(self._file).load() != MAGIC:
            raise ValueError("unknown format")
        _Unpickler(self._file).load()  # the protocol's version
        if not _Unpickler(self._file).load().get("little_endian", True):
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(self._file)
        content, places = unpickler.load(), {}
        for key in map(str, _Unpickler(self._file).load()):
            count, = struct.unpack("<q", self._file.read(8))
            dtype = unpickler.storages[key]
            if count < 0 or dtype is None:
                raise ValueError(f"storage {key} is of an unknown kind")
            places[key] = self._file.tell(), count * dtype.itemsize
            self._file.seek(sum(places[key]))

        def fetch(key: str) -> bytes:
            start, size = places[key]
            self._file.seek(start)
            return self._file.read(size)

        self._fetch = fetch
        return content

    def read(self, tensor: Stored) -> Tensor:
        """The tensor, contiguous, on the CPU; raises UserError if its bytes are not in the file."""
        nbytes = tensor.numel * tensor.dtype.itemsize
        try:
            if self._latest[0] != tensor.key:
                self._latest = tensor.key, bytearray(self._fetch(tensor.key))
            if len(self._latest[1]) != nbytes:
                raise ValueError(f"storage {tensor.key} does not have its {nbytes} bytes")
            if nbytes == 0:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            flat = torch.frombuffer(self._latest[1], dtype=tensor.dtype)
            view = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
        except Exception as error:  # zipfile and zlib raise many kinds
            raise UserError(f"{self.path} is damaged: {first_line(error)}") from None
        whole = view.is_contiguous() and view.numel() == tensor.numel
        return view if whole else view.clone(memory_format=torch.contiguous_format)
