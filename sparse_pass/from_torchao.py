"""From the config of torchao's sparse training to one of this package."""

from __future__ import annotations

from collections.abc import Mapping

from .config import ActivationSparsity, Scheme, WeightSparsity

_SCHEMES: dict[str, Scheme] = {
    "SemiSparseLinear": WeightSparsity(),
    "SemiSparseActivationLinear": ActivationSparsity(),
}


def config_from_torchao(config: Mapping[str, type]) -> dict[str, Scheme | None]:
    """The config that names what ``torchao.sparsity.training.swap_linear_with_semi_sparse_linear`` would have swapped.

    ``SemiSparseLinear`` becomes ``WeightSparsity()`` and ``SemiSparseActivationLinear`` ``ActivationSparsity()``. Names
    are exact FQNs in both. torchao itself is not needed: its classes are known by their names.

    Args:
        config: module names to these classes.

    Raises:
        ValueError: another class; the message names the entry.
    """
    converted: dict[str, Scheme | None] = {}
    for name, kind in config.items():
        known = [base.__name__ for base in getattr(kind, "__mro__", ()) if base.__name__ in _SCHEMES]
        if not known:
            raise ValueError(f"config[{name!r}] = {kind!r}: expected torchao's {' or '.join(_SCHEMES)}")
        converted[name] = _SCHEMES[known[0]]
    return converted
