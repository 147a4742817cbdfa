"""Random small networks for `test_properties`: what an example is, how it is built, and how it is drawn.

An `Example` is plain data. Its ``repr`` builds the same model, inputs and config again, so a failing one can be
pasted into a shell.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass.config import Scheme, input_scheme, weight_scheme

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# What stands around a linear. All take and return [..., features] and do nothing where the rank does not allow it.


def _heads(x: Tensor) -> Tensor:
    """Features in another order, by way of one more dim, as attention does with its heads."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if x.shape[-1] % 2 == 0 else x


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "swap": lambda x: x.transpose(0, 1) if x.dim() > 2 else x,
    "fold": lambda x: x.flatten(0, 1) if x.dim() > 2 else x,
    "unsqueeze": lambda x: x.unsqueeze(-2) if x.dim() < 5 else x,
    "expand": lambda x: x.expand(2, *x.shape) if x.dim() < 5 else x,
    "features outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "contiguous": lambda x: x.contiguous(),
    "heads": _heads,
    "but the first row": lambda x: x[1:] if x.dim() > 1 else x,
    "first row": lambda x: x.select(0, 0) if x.dim() > 2 and x.shape[0] else x,
    "but the first four": lambda x: x[..., 4:] if x.shape[-1] > 4 else x,
    "every second": lambda x: x[..., ::2] if x.shape[-1] > 7 else x,
    "twice": lambda x: torch.cat([x, x.sin()], -1) if x.shape[-1] < 101 else x,
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu_": lambda x: x.relu_(),
    "squared relu": lambda x: F.relu(x.tanh()).square(),  # tanh: squares of squares would overflow
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu gate": lambda x: F.silu(x) * x.cos(),
    "tanh": torch.tanh,
    "silu": F.silu,
    "gate": lambda x: x * torch.sigmoid(x),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}

FUSED = {
    "relu": "relu",
    "relu_": "relu",
    "squared relu": "squared_relu",
    "gelu": "gelu",
    "gelu tanh": "gelu_tanh",
    "silu gate": "silu_gate",
}
"""What the kernels of 2:4 inputs can compute by themselves, as a report has it."""

WAYS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "module": lambda x, fc: fc(x),
    "F.linear": lambda x, fc: F.linear(x, fc.weight, fc.bias),
    "x @ w.T": lambda x, fc: _plus(x @ fc.weight.T, fc.bias),
    "w @ x": lambda x, fc: _plus((fc.weight @ x.mT).mT if x.dim() > 1 else fc.weight @ x, fc.bias),
    "einsum": lambda x, fc: _plus(torch.einsum("...k,nk->...n", x, fc.weight), fc.bias),
    "halves": lambda x, fc: _plus(torch.cat([F.linear(x, half) for half in fc.weight.chunk(2)], -1), fc.bias),
    "Conv1D": lambda x, fc: fc(x),
}
"""How a block multiplies by its weight. All but the modules read it in the forward of the block."""

MODULES = ("module", "Conv1D")


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


class Conv1D(nn.Module):
    """A linear with a [K, N] weight, as GPT-2's. The pass knows it by the name of its class."""

    def __init__(self, k: int, n: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, n))
        self.bias = nn.Parameter(torch.randn(n)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Layer:
    """A linear and what stands around it, in this order; see `Block.body`."""

    width: int
    """Output features. Where `again` needs it or `tied` gives it, those of the input or of the layer before."""
    before: str = ""
    way: str = "module"
    bias: bool = True
    again: bool = False
    """The linear runs twice, which takes a square one."""
    strided: bool = False
    """The weight is stored column by column."""
    tied: bool = False
    """The weight is that of the layer before, where the shapes allow it."""
    frozen: str = ""
    """Which parameters need no gradient: a part of ``"weight bias"``."""
    activation: str = ""
    residual: bool = False
    after: str = ""
    checkpointed: bool = False


class Block(nn.Module):
    """One `Layer`. The weight is ``fc.weight``, whatever multiplies by it."""

    def __init__(self, layer: Layer, features: int, previous: Block | None) -> None:
        super().__init__()
        self.layer = layer
        k = _features(layer.before, features)
        self.again = layer.again and not layer.tied
        self.tied = bool(
            layer.tied
            and previous is not None
            and layer.way in MODULES
            and layer.way == previous.layer.way
            and k == previous.k
        )
        n = k if self.again else previous.n if self.tied and previous is not None else layer.width
        self.k, self.n = k, n
        self.fc = Conv1D(k, n, layer.bias) if layer.way == "Conv1D" else nn.Linear(k, n, layer.bias)
        with torch.no_grad():
            # Twice the variance of what keeps the size of the activations: a mask drops half of the weights.
            self.fc.weight.normal_(std=(2 / k) ** 0.5)
            if self.fc.bias is not None:
                self.fc.bias.normal_(std=0.5)
        if layer.strided:
            self.fc.weight = nn.Parameter(self.fc.weight.detach().T.contiguous().T)
        if self.tied and previous is not None:
            self.fc.weight = previous.fc.weight
        for name in layer.frozen.split():
            if getattr(self.fc, name) is not None and not (self.tied and name == "weight"):
                getattr(self.fc, name).requires_grad_(False)
        self.features = _features(layer.after, n)

    def multiply(self, x: Tensor) -> Tensor:
        return WAYS[self.layer.way](x, self.fc)

    def body(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = MOVES[layer.before](x)
        y = self.multiply(x)
        if self.again:
            y = self.multiply(torch.tanh(y))
        y = ACTIVATIONS[layer.activation](y)
        if layer.residual and y.shape[-1] == x.shape[-1]:
            y = y + x
        return MOVES[layer.after](y)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.layer.checkpointed else self.body(x)


def _features(move: str, features: int) -> int:
    return MOVES[move](torch.empty(2, 2, features, device="meta")).shape[-1]


class Network(nn.Module):
    """Blocks in a row; see `Example.broken` for how they come to be graphs."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        torch.manual_seed(example.seed)
        self.broken = example.broken
        blocks: list[Block] = []
        features = example.features
        for layer in example.layers:
            blocks.append(Block(layer, features, blocks[-1] if blocks else None))
            features = blocks[-1].features
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.broken == "parts":
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x
        # No loop: Dynamo gives up a whole frame that breaks in one.
        x = self.step(0, x)
        if self.broken:
            torch._dynamo.graph_break()
        x = self.step(1, x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.step(3, self.step(2, x))

    def step(self, index: int, x: Tensor) -> Tensor:
        return self.blocks[index](x) if index < len(self.blocks) else x


@dataclass(frozen=True)
class Example:
    """A network, its config, its input, and how it is run."""

    layers: tuple[Layer, ...]
    config: tuple[tuple[str, Scheme | None], ...]
    features: int
    batch: tuple[int, ...] = (3,)
    layout: str = "contiguous"
    input_grad: bool = True
    dtype: str = "float32"
    autocast: str = ""
    dynamic: str = ""
    """"" (static), ``"all"`` (``dynamic=True``) or ``"batch"`` (the first dim is marked)."""
    training: bool = True
    """False: under no_grad, which makes an inference graph."""
    broken: str = ""
    """"" (one graph), ``"breaks"`` (graph breaks between blocks) or ``"parts"`` (each block is captured by itself,
    since the frame that calls them is given up)."""
    wrapped: str = ""
    """What stands between the blocks and the compiler: one of `WRAPPERS`."""
    named: bool = True
    """Whether the backend is given ``model=``."""
    seed: int = 0

    def network(self, device: str = "cpu") -> Network:
        return Network(self).to(device, DTYPES[self.dtype])

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """One input; two of different sizes where the graph is dynamic."""
        batches = [self.batch]
        if self.dynamic:
            batches.append(tuple(size + 2 + place for place, size in enumerate(self.batch)))
        generator = torch.Generator().manual_seed(self.seed)
        return [self._input(batch, generator, device) for batch in batches]

    def _input(self, batch: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
        shape = (*batch, self.features)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, DTYPES[self.dtype])

        if self.layout == "transposed" and len(shape) > 1:
            x = randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        elif self.layout == "features outermost":
            x = randn(shape[-1], *shape[:-1]).movedim(0, -1)
        elif self.layout == "every second":
            x = randn(*batch, 2 * self.features)[..., ::2]
        elif self.layout == "expanded" and batch:
            x = randn(1, *shape[1:]).expand(shape)
        elif self.layout == "expanded features":
            x = randn(*batch, 1).expand(shape)
        elif self.layout == "offset":
            x = randn(2 * max(batch, default=1), *shape[1:])[1:].narrow(0, 0, shape[0]) if batch else randn(*shape)
        else:
            x = randn(*shape)
        return x.requires_grad_(self.input_grad)


class Wrapped(nn.Module):
    """The blocks of a network, each in a wrapper."""

    def __init__(self, network: Network, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(wrap(block) for block in network.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Forwarding(Wrapped):
    """With a `__getattr__` of its own, as many wrappers have."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def _as_it_is(block: nn.Module) -> nn.Module:
    return block


def _by_functional_call(network: nn.Module) -> Callable[..., Tensor]:
    return lambda tensors, x: functional_call(network, tensors, (x,))


WRAPPERS = ("own getattr", "checkpoint wrapper", "functional_call", "one by one", "container")


def compiled_as(
    example: Example, network: Network, backend_of: Callable[[nn.Module], Any], dynamic: bool | None
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The network as the user would call it, with the backend that was made for it.

    Args:
        backend_of: makes the backend for a model.
    """
    if example.wrapped in ("own getattr", "checkpoint wrapper"):
        kind, wrap = (Forwarding, _as_it_is) if example.wrapped == "own getattr" else (Wrapped, checkpoint_wrapper)
        backend = backend_of(model := kind(network, wrap))
        return torch.compile(model, backend=backend, dynamic=dynamic), backend
    backend = backend_of(network)
    if example.wrapped == "functional_call":
        call = torch.compile(_by_functional_call(network), backend=backend, dynamic=dynamic)
        # Other tensors than the parameters, of which these have the gradients.
        return lambda x: call({name: one.clone() for name, one in network.named_parameters()}, x), backend
    if example.wrapped == "one by one":
        for block in network.blocks:
            block.compile(backend=backend, dynamic=dynamic)
        return Wrapped(network, _as_it_is), backend
    if example.wrapped == "container":
        return torch.compile(nn.Sequential(*network.blocks), backend=backend, dynamic=dynamic), backend
    return torch.compile(network, backend=backend, dynamic=dynamic), backend


LAYOUTS = ("contiguous", "transposed", "features outermost", "every second", "expanded", "expanded features", "offset")


# What a config means


@dataclass(frozen=True)
class Place:
    """One block's use of a weight."""

    name: str
    names: tuple[str, ...]
    n: int
    k: int

    def takes(self, scheme: Scheme) -> bool:
        """Whether there are the 2:4 masks that a scheme asks for."""
        on_weight, on_input = weight_scheme(scheme) is not None, input_scheme(scheme) is not None
        return (self.k % 4 == 0 or not (on_weight or on_input)) and (self.n % 4 == 0 or not on_weight)


def places(network: Network) -> list[Place]:
    """The place of each block, with its own name and those of its parameter."""
    found = []
    for index, block in enumerate(network.blocks):
        aliases = [f"blocks.{i}.fc" for i, other in enumerate(network.blocks) if other.fc.weight is block.fc.weight]
        name = f"blocks.{index}.fc"
        found.append(Place(name, (name, *(f"{alias}.weight" for alias in aliases)), block.n, block.k))
    return found


def meant(example: Example, place: Place) -> Scheme | None:
    """The rule of the documentation: an exact name beats patterns, among patterns the first wins."""

    def regex(key: str) -> str:
        return key[3:] if key.startswith("re:") else re.escape(key).replace(r"\*", "[^.]*")

    matching = [
        (key, scheme) for key, scheme in example.config if any(re.fullmatch(regex(key), n) for n in place.names)
    ]
    exact = [scheme for key, scheme in matching if not key.startswith("re:") and "*" not in key]
    return (exact or [scheme for _, scheme in matching] or [None])[0]


# Strategies


def _mostly(usual: object, *others: object, times: int = 1) -> st.SearchStrategy:
    """The usual value ``times`` as often as all others; it is also what a failing example is reduced to."""
    return st.sampled_from([usual] * (times * len(others)) + list(others))


_quarters = st.integers(1, 50).map(lambda quarter: 4 * quarter)
widths = st.one_of(
    _quarters,
    st.sampled_from([64, 128, 192]),  # what the kernels take
    _quarters,
    st.integers(4, 200),
)

_backends = st.sampled_from(["auto", "cusparselt", "masked_dense", "cusparselt"])


def _weights(grad_weight: tuple[str, ...], *precision: str) -> st.SearchStrategy[sp.WeightSparsity]:
    return st.builds(
        sp.WeightSparsity,
        mask=st.sampled_from(["optimal", "greedy"]),
        grad_weight=st.sampled_from(grad_weight),
        decay=_mostly(0.0, 0.25, 2.0),
        scale=_mostly(1.0, "norm", 0.5),
        precision=st.sampled_from(["captured", *precision]),
        backend=_backends,
    )


_inputs = st.builds(
    sp.ActivationSparsity,
    mask=st.sampled_from(["optimal", "greedy", "rowwise"]),
    grad_input=st.sampled_from(["dense", "masked"]),
    backend=_backends,
)


def _gradients(*precision: str) -> st.SearchStrategy[sp.GradientSparsity]:
    return st.builds(
        lambda estimated, precision, backend: sp.GradientSparsity(
            grad_weight="mvue" if "grad_weight" in estimated else "dense",
            grad_input="mvue" if "grad_input" in estimated else "dense",
            precision="captured" if "grad_input" in estimated else precision,
            backend=backend,
        ),
        st.sampled_from(["grad_weight", "grad_input", "grad_weight grad_input"]),
        st.sampled_from(["captured", *precision]),
        _backends,
    )


_of_pairs = st.one_of(_weights(("dense", "masked", "mvue")), _gradients())
schemes = st.one_of(
    _weights(("dense", "masked"), "float8"),
    _weights(("mvue",), "float8"),
    _inputs,
    _gradients("float8"),
    st.one_of(st.tuples(_of_pairs, _inputs), st.tuples(_inputs, _of_pairs)),
)

layers = st.builds(
    Layer,
    width=widths,
    before=_mostly("", *MOVES),
    way=_mostly("module", *WAYS),
    bias=st.booleans(),
    again=_mostly(False, True, times=7),
    strided=_mostly(False, True, times=7),
    tied=_mostly(False, True, times=3),
    frozen=_mostly("", "weight", "bias", "weight bias", times=3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.booleans(),
    after=_mostly("", *MOVES),
    checkpointed=_mostly(False, True, times=4),
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Any example that the documentation promises to work."""
    features = draw(widths)
    depth = draw(st.sampled_from([1, 2, 3, 2, 4]))
    chosen = draw(st.lists(layers, min_size=depth, max_size=depth))
    if draw(st.booleans()):
        # Widths that fit, for residuals, ties and second runs.
        features = draw(st.one_of(_quarters, st.sampled_from([64, 128])))
        chosen = [replace(layer, width=features, before="", after="") for layer in chosen]
    dtype = draw(_mostly("float32", *DTYPES))
    dynamic = draw(_mostly("", "all", "batch", times=6))
    # Sizes 0 and 1 are never dynamic. Each dynamic size costs a second of a trace.
    rank = draw(st.integers(dynamic == "batch", {"": 4, "batch": 3, "all": 2}[dynamic]))
    batch = [draw(st.integers(2 if dynamic else 1, 5)) for _ in range(rank)]
    if batch and not dynamic and draw(_mostly(False, True, times=9)):
        batch[draw(st.integers(0, rank - 1))] = 0
    if not dynamic and draw(_mostly(False, True, times=9)):
        batch = [features]  # a square input, whose shape does not tell it from its transpose
    moves = [move for layer in chosen for move in (layer.before, layer.after)]
    draft = Example(
        layers=tuple(chosen),
        config=(),
        features=features,
        batch=tuple(batch),
        layout=draw(_mostly("contiguous", *LAYOUTS)),
        input_grad=draw(_mostly(True, False, times=2)),
        dtype=dtype,
        autocast=draw(_mostly("", "bfloat16", "float16")) if dtype == "float32" else "",
        # A mark is a promise that a size is not looked at.
        dynamic="all" if dynamic == "batch" and "but the first row" in moves else dynamic,
        training=draw(_mostly(True, False, times=5)),
        broken=draw(_mostly("", "breaks", "parts", times=9)),
        wrapped=draw(_mostly("", *WRAPPERS, times=2)),
        seed=draw(st.integers(0, 2**16)),
    )
    network = draft.network()
    config = draw(configs(network))
    if not _can_be_wrapped(draft, network, config):
        draft = replace(draft, wrapped="")
    absolute = draft.wrapped in ("one by one", "container")
    return replace(draft, config=config, named=absolute or _needs_model(network) or draw(st.booleans()))


def _can_be_wrapped(example: Example, network: Network, config: tuple[tuple[str, Scheme | None], ...]) -> bool:
    if example.broken or _tied(network):
        return False  # two ways at once; and what parts share is a matter of each graph
    if example.wrapped == "functional_call":
        # What is not the parameter goes by the name of the module that multiplies by it, and has the dynamic sizes
        # of an input, for which a linear is skipped.
        known = example.dynamic != "all" and all(layer.way == "module" for layer in example.layers)
        return known and not any("weight" in key for key, _ in config)
    return True


def _tied(network: Network) -> bool:
    return any(one.fc.weight is two.fc.weight for one, two in pairwise(network.blocks))


def _needs_model(network: Network) -> bool:
    """Without ``model=`` a tied weight has the name under which it is first read, and parts have relative names."""
    return _tied(network) or bool(network.broken)


def _without_decay(scheme: Scheme) -> Scheme:
    parts = scheme if isinstance(scheme, tuple) else (scheme,)
    parts = tuple(replace(one, decay=0.0) if isinstance(one, sp.WeightSparsity) else one for one in parts)
    return parts if isinstance(scheme, tuple) else parts[0]


@st.composite
def configs(draw: st.DrawFn, network: Network) -> tuple[tuple[str, Scheme | None], ...]:
    """One to four entries of all kinds; each names a weight, and an exact one names a weight that has masks."""
    known = places(network)
    exact = {name: place for place in known for name in (place.name, f"{place.name}.weight")}
    numbers = "".join(map(str, range(0, len(known), 2)))
    patterns = ["blocks.*.fc", "*.*.*", "re:.*", rf"re:blocks\.[{numbers}]\.fc", r"re:.*\.fc\.weight"]
    palette = draw(st.lists(schemes, min_size=1, max_size=3))
    if _tied(network) and (network.broken or len(palette) > 1):
        # Decay is added once in each graph, and of two schemes of one parameter it is not defined whose mask it takes.
        palette = [_without_decay(one) for one in palette]
    # The first entry names what it can; the others may take some of it back.
    first = draw(st.sampled_from([*patterns[:3], *(name for name in exact if exact[name].takes(palette[0]))]))
    others = draw(st.lists(st.sampled_from([*patterns, *exact]), max_size=3, unique=True))
    entries: dict[str, Scheme | None] = {first: palette[0]}
    for key in others:
        scheme = draw(_mostly(palette[-1], None, *palette))
        entries[key] = scheme if key not in exact or scheme is None or exact[key].takes(scheme) else None
    return tuple(draw(st.permutations(list(entries.items()))))
