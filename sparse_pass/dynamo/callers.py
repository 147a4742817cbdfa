"""The modules whose code is running: where Dynamo's frame holds a part of a model, they lead to the whole.

After a graph break in a loop Dynamo compiles the parts that the loop calls, each in a frame of its own, and the model's
``forward`` runs as Python. Parts that are compiled one by one are called by it as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn


def calling_modules(parts: Collection[nn.Module]) -> list[nn.Module]:
    """The modules among the ``self`` of the functions that are being called now, that contain one of ``parts``.

    The outermost comes first.
    """
    found: dict[int, nn.Module] = {}
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found[id(module)] = module
        frame = frame.f_back
    held = {id(part) for part in parts}
    return [one for one in reversed(found.values()) if any(id(part) in held for part in one.modules())]
