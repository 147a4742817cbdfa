"""Dynamo's limit of graphs: beyond it a call runs eagerly, and so dense."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from torch import nn
from torch._dynamo import config

from .sources import running_scope


def is_exhausted(model: nn.Module) -> bool:
    """Whether Dynamo has made all the graphs of a model's forward that it makes: the next backend gets none."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = getattr(type(model).forward, "__code__", None)
    limit = min(config.recompile_limit, config.accumulated_recompile_limit)
    return code is not None and len(_debug_get_cache_entry_list(code)) >= limit


def why_last() -> str:
    """What follows if the graph that Dynamo has captured just now is the last one it makes of that code; else ""."""
    from torch._dynamo.cache_size import _has_same_id_matched_objs
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    output = running_scope()
    if output is None:
        return ""  # called by hand
    if config.fail_on_recompile_limit_hit or output.root_tx.one_graph:
        return ""  # Dynamo raises
    code = output.root_tx.f_code
    frame = cast(Any, SimpleNamespace(f_locals=output.local_scope))
    entries = _debug_get_cache_entry_list(code)
    counts = {
        "recompile_limit": sum(_has_same_id_matched_objs(frame, entry) for entry in entries),
        "accumulated_recompile_limit": len(entries),
    }
    reached = [name for name, count in counts.items() if count + 1 >= getattr(config, name)]
    if not reached:
        return ""
    limit = f"torch._dynamo.config.{reached[0]} = {getattr(config, reached[0])}"
    return (
        f"Dynamo makes no more than {limit} graphs of one code,"
        f" and has as many of {code.co_name!r} ({code.co_filename}:{code.co_firstlineno}): a call that fits none of"
        " them will run eagerly, with its named linears dense. Raise the limit, or compile with dynamic=True to need"
        " fewer graphs, or with fullgraph=True to have an error instead"
    )
