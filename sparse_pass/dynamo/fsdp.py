"""What FSDP2 hands to the compiled code in the place of a parameter."""

from __future__ import annotations

import sys

import torch
from torch import nn


def gathered_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """By the ids of parameters: the dtype that FSDP2's ``MixedPrecisionPolicy(param_dtype=...)`` gathers them in.

    Parameters without such a policy are not in it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it no module is sharded
    dtypes: dict[int, torch.dtype | None] = {}
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            # The innermost module that is sharded by itself holds the parameter, and comes last.
            dtype = module._get_fsdp_state()._mp_policy.param_dtype
            dtypes.update((id(parameter), dtype) for parameter in module.parameters())
    return {parameter: dtype for parameter, dtype in dtypes.items() if dtype is not None}
