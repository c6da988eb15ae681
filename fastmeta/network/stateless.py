"""A module as a function of its parameters, and copies of tensors that a pass may write."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from fastmeta.tasks import Tree


class Slots:
    """The places in a module where its parameters and buffers hang; holds no module."""

    def __init__(self, module: nn.Module) -> None:
        canonical: dict[int, str] = {}
        self.trainable: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.filled: list[tuple[dict[str, Any], str, str]] = []
        """(dictionary, key, name); tied tensors go by the first of their names."""
        self.empty: list[tuple[dict[str, Any], str]] = []
        self.buffers: set[str] = set()
        for prefix, part in module.named_modules(remove_duplicate=False):
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is None:
                        self.empty.append((tensors, key))
                        continue
                    name = canonical.setdefault(id(tensor), f"{prefix}.{key}".lstrip("."))
                    self.filled.append((tensors, key, name))
                    if tensors is part._buffers:
                        self.buffers.add(name)
                    else:
                        self.parameters[name] = tensor
                        if tensor.requires_grad:
                            self.trainable[name] = tensor


swapping = threading.RLock()
"""Held while a module has other tensors than its own: two models may share it, in two threads."""


class StatelessModel:
    """A module as a function of its parameters: a pass leaves the module as it was.

    `written` names the buffers that a pass writes in place (running statistics); each pass writes
    to a copy that is thrown away, of any other buffer too: a setting, or other data, may have it
    written after all. What `torch.func.functional_call` does, at a third of its cost: the places to
    swap are looked up once, and kept as long as the caller keeps `slots`.
    """

    def __init__(
        self, module: nn.Module, written: tuple[str, ...] = (), slots: Slots | None = None
    ) -> None:
        self.module = module
        self.written = written
        self._slots = Slots(module) if slots is None else slots
        self.may_write = self._slots.buffers.difference(written)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name, tied ones once."""
        return self._slots.trainable

    def all_parameters(self) -> dict[str, Tensor]:
        """The parameters by name, frozen ones too."""
        return self._slots.parameters

    def writing(self, written: tuple[str, ...]) -> StatelessModel:
        """The same model, whose passes write these buffers."""
        return StatelessModel(self.module, written, self._slots)

    def with_parameters(self, more: Mapping[str, Tensor]) -> StatelessModel:
        """The same model beside further parameters, which no pass of the module reads."""
        slots = copy.copy(self._slots)
        slots.parameters = {**slots.parameters, **more}
        learning = {name: tensor for name, tensor in more.items() if tensor.requires_grad}
        slots.trainable = {**slots.trainable, **learning}
        return StatelessModel(self.module, self.written, slots)

    def scratch(self) -> dict[str, Tensor]:
        """The buffers that a pass writes, cut off from autograd."""
        return {name: self.module.get_buffer(name).detach() for name in self.written}

    def __call__(
        self, tensors: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        """The prediction with these parameters and buffers in place of the module's own."""
        with swapping:
            before = [place[key] for place, key, _ in self._slots.filled]
            try:
                try:
                    return self._with(tensors, inputs, scratch)
                finally:
                    self._put_back(before)
            except BaseException:
                # Once more, because an interrupt may have come while it was put back.
                self._put_back(before)
                raise

    def _with(
        self, tensors: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        filled, may_write = self._slots.filled, self.may_write
        for place, key, name in filled:
            if name in scratch:
                place[key] = scratch[name].clone()
            elif name in tensors:
                place[key] = tensors[name]
            elif name in may_write:
                place[key] = private(place[key])
        if isinstance(inputs, Mapping):
            return self.module(**inputs)
        if isinstance(inputs, (tuple, list)):
            return self.module(*inputs)
        return self.module(inputs)

    def _put_back(self, before: list[Tensor]) -> None:
        # Every tensor, because a forward may also have bound a buffer anew.
        for (place, key, _), tensor in zip(self._slots.filled, before, strict=True):
            place[key] = tensor
        for place, key in self._slots.empty:
            place[key] = None


_SMALL = 1 << 14
"""Elements of a tensor that are copied in no more time than it takes to put that off."""


def private(tensor: Tensor) -> Tensor:
    """A copy to write to. The memory of a large one is copied when either tensor is written."""
    if tensor.numel() > _SMALL:
        # Refused where its memory is not torch's own: NumPy's, a mapped file.
        with suppress(RuntimeError, TypeError):
            return tensor._lazy_clone()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor.clone()
