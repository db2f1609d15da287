"""Bytes of the tensors that live in this process, counted as they are made and freed."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def living_storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors of this process that have memory, by address."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type != "meta"]
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


class AllocatedBytes(TorchDispatchMode):
    """Counts the storages of all tensors but `others`: those there when it is entered, and those operators make."""

    def __init__(self, others: dict[int, torch.UntypedStorage]):
        super().__init__()
        self.others = others
        self._seen: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __enter__(self) -> "AllocatedBytes":
        for storage in living_storages().values():
            self._count(storage)
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.device.type != "meta":
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._seen or key in self.others:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None):
            self.now -= size
