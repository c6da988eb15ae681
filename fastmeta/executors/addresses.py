"""The one way by which a tensor becomes an address that compiled code reads or writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmeta.wording import a_kind

_PLAIN = frozenset((Tensor, nn.Parameter))


class Addresses:
    """Addresses of tensors, which stay valid as long as this object lives."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, tensor: Tensor | None, name: str) -> int:
        """The address of a tensor's elements, of a copy where they are not contiguous; 0 of None.

        **Raises** `RuntimeError` or `TypeError` naming it, where it has no such memory.
        """
        return self.each((tensor,), (name,))[0]

    def each(self, tensors: Iterable[Tensor | None], names: Sequence[str | None]) -> list[int]:
        """The address of each, named by what is at its place in `names`."""
        found: list[int] = []
        for tensor in tensors:
            if tensor is None:
                found.append(0)
            elif (
                type(tensor) in _PLAIN
                and (address := tensor.data_ptr())
                and (rest := tensor.untyped_storage().nbytes() - tensor.nbytes) >= 0
                and tensor.is_contiguous()
                and not tensor.is_neg()
                and (not (offset := tensor.storage_offset()) or rest >= offset * tensor.itemsize)
            ):
                found.append(address)
            else:
                plain = in_memory(tensor, names[len(found)] or "a tensor")
                self._kept.append(plain)
                found.append(plain.data_ptr())
        return found


def in_memory(tensor: Tensor, name: str) -> Tensor:
    """A plain tensor with its elements in order in memory: itself, detached, or a copy.

    **Raises** `RuntimeError` or `TypeError` naming it, where there is no such memory.
    """
    if overrides(tensor):
        raise TypeError(
            f"{name}: {a_kind(tensor)}, whose memory compiled code can't read; pass a "
            "plain tensor, or executor='generic', which calls its operators"
        )
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    check_storage(tensor, name)
    plain = tensor.detach().resolve_neg().contiguous()
    if plain.data_ptr() == 0 and plain.numel() > 0:
        raise TypeError(
            f"{name}: a tensor of a transform of torch.func, which has no memory of its own; call "
            "the step outside of the transform, or pass executor='generic'"
        )
    return plain


def check_storage(tensor: Tensor, name: str) -> None:
    """**Raises** `RuntimeError` where a shape and strides reach behind the storage."""
    if tensor.numel() == 0:
        return
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise RuntimeError(
            f"{name}: its storage holds {held:,} bytes, but its shape {list(tensor.shape)} needs "
            f"{needed:,}: it was freed or resized after the tensor was made. FSDP does that to "
            "parameters between uses: gather them first, by summon_full_params() or unshard()"
        )


def overrides(tensor: Any) -> bool:
    """Return whether a tensor's class has operators of its own."""
    kind, plain = type(tensor), cast("Any", Tensor)
    if kind.__torch_dispatch__ is not plain.__torch_dispatch__:
        return True
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    known = (plain.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return function not in known
