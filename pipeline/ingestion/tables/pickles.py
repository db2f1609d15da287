"""Reads CIFAR's Python batches, which are pickles, without running anything that they say.

A pickle names functions and calls them. Here every name that numpy's arrays need stands for a class of this file that
only keeps what it is called with, and any other name is an error: nothing of another module is ever called, and as each
has a `__setstate__`, none can be changed.
"""

import pickle
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import InputError


class _Type:
    """In place of numpy's dtype: only unsigned bytes pass."""

    def __init__(self, name: object, *arguments: object):
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment say nothing about single bytes


class _Array:
    """In place of numpy's ndarray."""

    values: np.ndarray | None = None

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Type) or kind.name not in ("u1", b"u1") or not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("holds an array that is none of unsigned bytes")
        content = content.encode("latin-1") if isinstance(content, str) else content
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Bytes:
    """In place of the function by which Python 3 writes bytes for Python 2."""

    def __new__(cls, text: object, encoding: object = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("encodes something that is not bytes")
        return text.encode("latin-1")

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"would run {module}.{name}") from None


def read_batch(file: BinaryIO, path: object) -> dict[str, Any]:
    """The dict of a batch or meta file: arrays of unsigned bytes, lists, numbers, and text. InputError for anything
    else, which then has not run."""
    try:
        content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # a hostile or cut pickle leads to any of them
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not read, it is no batch of CIFAR or cut ({why}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not the dict of a batch of CIFAR; fetch it again")
    named = {_text(key): value for key, value in content.items() if isinstance(key, bytes | str)}
    return {key: value.values if isinstance(value, _Array) else value for key, value in named.items()}


def texts(values: object) -> list[str]:
    """A pickled list of names; empty where it is none."""
    plain = isinstance(values, list) and all(isinstance(value, bytes | str) for value in values)
    return [_text(value) for value in values] if plain else []


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
