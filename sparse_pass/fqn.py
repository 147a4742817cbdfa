"""Names of layers: normal form, patterns, and where a captured graph keeps them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Config, Scheme, is_float8, scheme_text, why_no_scheme

# Wrappers put these parts into a module path; they are no part of the name a user knows.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DistributedDataParallel and DataParallel hold the model in `.module`: only a leading part is theirs.
_LEADING_WRAPPER = "module"

_ACCESS = re.compile(
    r"""
      \._(?:modules|parameters|buffers)\[ (?P<q1>['"]) (?P<member>.*?) (?P=q1) \]
    | \.__dict__\[ (?P<q0>['"]) _(?:modules|parameters|buffers) (?P=q0) \]\[ (?P<q4>['"]) (?P<own>.*?) (?P=q4) \]
    | \.__dict__\[ (?P<q2>['"]) (?P<entry>.*?) (?P=q2) \]
    | \[ (?P<q3>['"]) (?P<key>.*?) (?P=q3) \]
    | \[ (?P<index>\d+) \]
    | \.(?P<attr>[^.\[\]()]+)
    """,
    re.VERBOSE,
)
_ROOT = re.compile(r"""^[LG]\[(['"])\w+\1\]""")
_MEMBERS = re.compile(r"""\._(?:modules|parameters)\[|\.__dict__\[(['"])_(?:modules|parameters)\1\]\[""")
# Ways to an object that are no part of its name: of a method to its object, of a closure to what it holds.
_BOUND = re.compile(r"\.__(?:self|func)__|\.__closure__\[\d+\]\.cell_contents")
_GETATTR = re.compile(r"""getattr\(([^()]*), *(['"])([^'"]*)\2\)""")


def normalize(name: str) -> str:
    """Drop the parts that wrappers add: ``_orig_mod.module.fc1`` -> ``fc1``."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _LEADING_WRAPPER:
        parts = parts[1:]
    return ".".join(parts)


def from_source(source: str) -> str:
    """The attribute path below the root of a Dynamo source or module-stack entry, or "".

    ``L['self']._modules['blocks']._modules['0']._parameters['weight']`` -> ``blocks.0.weight`` and
    ``L['self'].blocks.0.fc1`` -> ``blocks.0.fc1``. Paths of torch.export have no root: ``blocks.0.fc1``.
    """
    while source != (plain := _GETATTR.sub(r"\1.\3", source)):
        source = plain
    source = _BOUND.sub("", source)
    root = _ROOT.match(source)
    if root is None:
        return "" if "[" in source else normalize(source)
    rest = source[root.end() :]
    if (first := _MEMBERS.search(rest)) is not None:
        # A module held by a closure, a list or an attribute of a plain object: what leads to the
        # module is not a part of its own names.
        rest = rest[first.start() :]
    parts: list[str] = []
    position = 0
    while position < len(rest):
        access = _ACCESS.match(rest, position)
        # Module stacks print children as attributes, whatever their keys: `.blocks.0`, `.heads.a-b`.
        if access is None:
            return ""
        parts.append(next(text for text in access.group("member", "own", "entry", "key", "index", "attr") if text))
        position = access.end()
    return normalize(".".join(parts))


class AllNames(tuple[str, ...]):
    """All names of a parameter that is known itself, and not by the path that led to it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of a config. ``exact`` entries beat the others; among the others the first wins."""

    text: str
    regex: re.Pattern[str]
    exact: bool
    scheme: Scheme | None

    def names(self, names: Iterable[str]) -> bool:
        """Whether the pattern names any of ``names`` (already in normal form)."""
        return any(self.regex.fullmatch(name) for name in names)


def parse_config(config: Config) -> tuple[Pattern, ...]:
    """Check a config and compile its patterns.

    Raises:
        ValueError: empty mapping, a value that is no scheme, a regex that does not compile; the
            message names the entry.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must map names to schemes, got {type(config).__name__}: {config!r}")
    if not config:
        raise ValueError("config is empty: name at least one linear, such as {'blocks.*.mlp.fc1': WeightSparsity()}")
    return tuple(_parse_entry(text, scheme) for text, scheme in config.items())


def _parse_entry(text: str, scheme: Any) -> Pattern:
    if not isinstance(text, str) or not text:
        raise ValueError(f"config key {text!r}: expected a layer name, a `*` pattern or 're:<regex>'")
    if scheme is not None and (reason := why_no_scheme(scheme)):
        raise ValueError(f"config[{text!r}] = {scheme!r}: {reason}")
    if isinstance(scheme, tuple) and is_float8(scheme):
        raise ValueError(
            f"config[{text!r}] = {scheme_text(scheme)}: precision='float8' is for one scheme alone, as a 2:4 input"
            " is multiplied in the captured precision; take ActivationSparsity or precision='float8' out"
        )
    if text.startswith("re:"):
        try:
            regex = re.compile(text[3:])
        except re.error as error:
            raise ValueError(f"config key {text!r}: the regular expression does not compile: {error}") from None
        return Pattern(text, regex, False, scheme)
    parts = ["[^.]+" if part == "*" else re.escape(part).replace(r"\*", "[^.]*") for part in normalize(text).split(".")]
    return Pattern(text, re.compile(r"\.".join(parts)), "*" not in text, scheme)


def choose(patterns: Sequence[Pattern], names: Sequence[str]) -> Pattern | None:
    """The entry that decides for a linear known by ``names``, or None."""
    named = [pattern for pattern in patterns if pattern.names(names)]
    return next((p for p in named if p.exact), named[0] if named else None)


def nearest(text: str, known: Iterable[str]) -> list[str]:
    """Up to five known names that a misspelt one may have meant, best first."""
    return difflib.get_close_matches(normalize(text), sorted(known), n=5, cutoff=0.3)
