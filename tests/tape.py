"""Captures work on the CPU as CUDA captures a graph: operations at fixed addresses, replayed without Python."""

from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)

EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty)


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def place(tensor):
    return tensor.untyped_storage()._cdata


class Reads(TorchDispatchMode):
    """Counts how often a number is asked of a tensor: on a GPU each of these waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """Notes every operation, and the memory that it overwrites."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()
        self.kept = []  # so that no place is used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = tensors_of((args, kwargs))
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, chain(args, kwargs.values()), strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(tensors_of(value))
            for argument in func._schema.arguments:
                if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(tensors_of(kwargs[argument.name]))
        if func is torch.ops.aten.native_batch_norm.default:  # whose signature does not say that it writes
            self._save(tensors_of(args[3:5]))
        result = func(*args, **kwargs)
        given_places = {place(tensor) for tensor in given}
        new = [tensor for tensor in tensors_of(result) if place(tensor) not in given_places]
        self.made |= {place(tensor) for tensor in new}
        self.kept += [*given, *tensors_of(result)]
        if func.overloadpacket in EMPTY:
            return result  # no kernel runs
        if new or func._schema.is_mutable:
            self.operations.append((func, args, kwargs, result))
        return result

    def _save(self, tensors):
        for tensor in tensors:
            if place(tensor) not in self.made and place(tensor) not in self.before:
                self.before[place(tensor)] = (tensor.untyped_storage(), tensor.untyped_storage().clone())


class TapePool:
    """Stands for `localprop.network.graphs.CudaGraphPool`.

    Args:
        finds: whether it finds code that waits for the device, before a capture.
    """

    def __init__(self, finds=True):
        self.captures = 0
        self.finds = finds

    def warm_up(self):
        return nullcontext()

    @contextmanager
    def find_syncs(self):
        places = []
        with Reads() as reads:
            yield places
        if reads.count and self.finds:
            places.append("line 1 of model.py")

    def capture(self, work):
        tape = _Tape()
        try:
            with tape:
                work()
        finally:
            for storage, content in tape.before.values():  # a capture computes nothing
                storage.copy_(content)
        self.captures += 1
        operations, kept = tape.operations, tape.kept

        def replay():
            assert kept
            with torch.no_grad():
                for func, args, kwargs, result in operations:
                    again = func(*args, **kwargs)
                    places = {place(tensor) for tensor in tensors_of((args, kwargs))}
                    for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                        if place(old) not in places:
                            old.copy_(new)

        return replay
