"""Values on their way from one device to another."""

from __future__ import annotations

import numpy as np

from ai_assistant.errors import AIAssistantError, NotSupported
from ai_assistant.hal.contract import Context, Tensor
from ai_assistant.hal.graph import Array


def shared(source: Context, tensor: Tensor, target: Context) -> Tensor | None:
    """The same memory as a tensor of another device; None where a copy is needed."""
    if source is target:
        return tensor
    if not (source.capabilities.host_memory and target.capabilities.host_memory):
        return None
    try:
        return target.allocator.adopt(source.allocator.view(tensor))
    except NotSupported:
        return None


def copy(source: Context, tensor: Tensor, target: Context, into: Tensor) -> None:
    """Copy through the host's memory: once where either side can be viewed, twice otherwise."""
    target.allocator.copy_in(into.buffer, host_array(source, tensor), into.offset)


def host_array(context: Context, tensor: Tensor) -> Array:
    """A tensor's values in the host's memory: a view where that can be had, otherwise a copy, as bytes."""
    if context.capabilities.host_memory:
        try:
            return context.allocator.view(tensor)
        except AIAssistantError:
            pass
    into = np.empty(tensor.spec.nbytes, np.uint8)
    context.allocator.copy_out(tensor.buffer, into, tensor.offset)
    return into
