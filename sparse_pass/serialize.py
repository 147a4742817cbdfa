"""Configs as plain data: to and from dicts, and from JSON and YAML files.

A scheme is ``{"WeightSparsity": {"mask": "greedy"}}``, or with default fields the name alone: ``"WeightSparsity"``.
A tuple of two has two keys, in its order. None leaves a layer dense, as in a config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias

from .config import ActivationSparsity, Config, GradientSparsity, Scheme, Single, WeightSparsity
from .fqn import parse_config

ConfigSource: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"
"""A mapping of names to schemes or to their plain form, the path of a JSON or YAML file, or JSON itself."""

_KINDS: tuple[type[Single], ...] = (WeightSparsity, ActivationSparsity, GradientSparsity)
_SCHEMES = {kind.__name__: kind for kind in _KINDS}
_YAML = (".yaml", ".yml")


def scheme_to_dict(scheme: Scheme) -> dict[str, dict[str, Any]]:
    """All fields of a scheme by its name, those of a tuple in its order."""
    return {type(one).__name__: asdict(one) for one in (scheme if isinstance(scheme, tuple) else (scheme,))}


def scheme_from_dict(data: str | Mapping[str, Any], about: str = "scheme") -> Scheme:
    """The scheme that `scheme_to_dict` wrote. Fields that are left out have their defaults.

    Args:
        about: what errors call it.

    Raises:
        ValueError: a name or a field that is not known, or a value that the scheme refuses.
    """
    named = {data: {}} if isinstance(data, str) else data
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{about} = {data!r}: expected the name of a scheme, or a mapping such as {_example()}")
    refuse_unknown(about, named, _SCHEMES)
    parts = []
    for name, values in named.items():
        values = {} if values is None else values  # as YAML has a key without a value
        kind = _SCHEMES[name]
        if not isinstance(values, Mapping):
            raise ValueError(f"{about}: {name} = {values!r}: expected a mapping of its fields")
        refuse_unknown(f"{about}: {name}", values, [field.name for field in fields(kind)])
        parts.append(kind(**values))
    return parts[0] if len(parts) == 1 else tuple(parts)  # type: ignore[return-value]


def config_to_dict(config: Config) -> dict[str, Any]:
    """A config as plain data, for JSON or YAML: all fields of each scheme, and None where a layer is left dense.

    ``config_from_dict(config_to_dict(config)) == config``, for every config that is valid.

    Args:
        config: names to schemes, as for :func:`sparse_backend`.

    Raises:
        ValueError: bad config.
    """
    parse_config(config)
    return {name: None if scheme is None else scheme_to_dict(scheme) for name, scheme in config.items()}


def config_from_dict(data: Mapping[str, Any]) -> dict[str, Scheme | None]:
    """The config of plain data, as ``json.load`` or a YAML reader gives it.

    Args:
        data: names to ``{"WeightSparsity": {"mask": "greedy"}}``; to ``"WeightSparsity"``, with the defaults; to two
            schemes in one mapping, for a tuple of them; or to None (leave dense). Schemes themselves may be in it.

    Raises:
        ValueError: a scheme or a field that is not known, a value that a scheme refuses, an empty mapping; the message
            names the entry.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config = {data!r}: expected a mapping of names to schemes such as {_example()}")
    config: dict[str, Any] = {}
    for name, entry in data.items():
        is_made = entry is None or isinstance(entry, (tuple, *_KINDS))
        config[name] = entry if is_made else scheme_from_dict(entry, f"config[{name!r}]")
    parse_config(config)
    return config


def load_config(source: ConfigSource) -> dict[str, Scheme | None]:
    """A config from wherever it is.

    Args:
        source: a mapping, as for `config_from_dict`; the path of a ``.json``, ``.yaml`` or ``.yml`` file; or JSON text,
            which begins with ``{``. YAML needs the package PyYAML: ``pip install "sparse_pass[yaml]"``.

    Raises:
        ValueError: what `config_from_dict` refuses; a file of another kind, or one that cannot be read or parsed.
        ModuleNotFoundError: a YAML file without PyYAML.
    """
    if isinstance(source, Mapping):
        return config_from_dict(source)
    text = os.fspath(source)
    if text.lstrip().startswith("{"):
        return config_from_dict(_parsed(text, "the config", is_yaml=False))
    path = Path(text).expanduser()
    if path.suffix.lower() not in (".json", *_YAML):
        raise ValueError(
            f"config {text!r}: expected the path of a .json, .yaml or .yml file, or JSON that begins with '{{'"
        )
    try:
        content = path.read_text()
    except OSError as error:
        raise ValueError(f"config {text!r} cannot be read: {error}") from None
    return config_from_dict(_parsed(content, f"config {text!r}", is_yaml=path.suffix.lower() in _YAML))


def _parsed(text: str, about: str, *, is_yaml: bool) -> Any:
    if not is_yaml:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{about} is no JSON: {error}") from None
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'{about}: YAML needs PyYAML: pip install "sparse_pass[yaml]"') from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{about} is no YAML: {error}") from None


def refuse_unknown(about: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise a ValueError that names the keys that are not known, and those that are."""
    unknown = [key for key in given if key not in known]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"{about}: unknown key{'s' * (len(unknown) > 1)} {listed}; known: {', '.join(known)}")


def _example() -> str:
    return '{"blocks.*.mlp.fc1": {"WeightSparsity": {"mask": "greedy"}}}'
