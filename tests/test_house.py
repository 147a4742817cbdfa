"""How the code stands: who imports whom, what is public, and what an import may do."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sparse_pass as sp

PACKAGE = Path(sp.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Which folder, or module at the top, may import which: each only what stands below it.
ALLOWED = {
    "__main__": "cli",
    "cli": "cli config doctor explain plan predict registered report serialize suggest vocabulary",
    "__init__": "backend config explain from_torchao graph_pass inductor metrics one_graph ops prune report schedule"
    " serialize suggest verify",
    "doctor": "kernels vocabulary",
    "suggest": "config explain model_names predict usage",
    "registered": "backend captured config dynamo fqn model_names report serialize",
    "from_torchao": "config",
    "schedule": "backend callbacks config",
    "callbacks": "",
    "explain": "capture captured config fqn graph_pass model_names predict report usage",
    "predict": "config fqn plan predict report serialize vocabulary",
    "backend": "capture captured config dynamo graph_pass inductor model_names phases report usage",
    "phases": "dynamo graph_pass report shared_graphs watch",
    "watch": "dynamo graph_pass model_names report shared_graphs",
    "shared_graphs": "captured graph model_names report",
    "inductor": "capture captured config graph_pass model_names one_graph report",
    "captured": "dynamo fqn graph",
    "capture": "graph_pass",
    "dynamo": "config dynamo fqn model_names shards",
    "usage": "",
    "graph_pass": "config fqn graph one_graph ops plan report shared_graphs vocabulary",
    "one_graph": "apply config fqn graph plan report",
    "metrics": "config fqn model_names ops prune",
    "verify": "config ops prune report vocabulary",
    "prune": "config dynamo fqn model_names ops plan report",
    "model_names": "config fqn plan",
    "apply": "apply graph ops plan vocabulary",
    "plan": "config fqn graph kernels plan vocabulary",
    "graph": "fqn graph shards",
    "ops": "kernels ops shards vocabulary",
    "report": "config serialize",
    "serialize": "config fqn",
    "fqn": "config",
    "config": "",
    "kernels": "kernels vocabulary",
    "shards": "vocabulary",
    "vocabulary": "",
}

CONTRACT = {
    "Metrics": "(model, config, *, every=50)",
    "Schedule": "(backend, start=0, stop=None, *, patterns=None)",
    "ActivationSparsity": "(*, mask='optimal', grad_input='dense', backend='auto')",
    "GradientSparsity": "(*, grad_weight='mvue', grad_input='dense', precision='captured', backend='auto')",
    "WeightSparsity": "(*, mask='optimal', grad_weight='dense', decay=0.0, scale=1.0, precision='captured',"
    " backend='auto')",
    "sparse_backend": "(config, *, model=None, whole=None, inner='inductor', strict=False, tune='auto', require=None,"
    " **inductor_options)",
    "SparsePass": "(config, *, strict=False, tune='auto', require=None)",
    "config_from_dict": "(data)",
    "config_from_torchao": "(config)",
    "config_to_dict": "(config)",
    "load_config": "(source)",
    "suggest": "(model, *, device='h100', scheme=None)",
    "inductor_options": "(config, options=None, *, model=None)",
    "rewrite": "(graph_module, config, *, parameters=None)",
    "explain": "(model, config, *, device=None)",
    "mask24": "(weight, mask='optimal')",
    "prune_": "(model, config, *, dtype=None, whole=None)",
    "verify24": "(model, config)",
}
"""The public names and their signatures."""
RECORDS = {"Report", "Site"}
"""What those return."""


@dataclass(frozen=True)
class Import:
    """One import of one of our modules."""

    source: str
    target: str
    at_import: bool
    """Whether it runs when the source is imported, and not only in a function or for a type checker."""


def layer(module: str) -> str:
    """The folder of a module, such as `kernels`, or else the module itself."""
    return module.partition(".")[0]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(file) for file in FILES}


def imports_of(file: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child, at_import
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from walk(child, at_import and not lazy)

    yield from walk(ast.parse(file.read_text()), True)


def our_imports(file: Path) -> Iterator[Import]:
    source = module_name(file)
    folder = ["sparse_pass", *source.split(".")[:-1]]
    for node, at_import in imports_of(file):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            start = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, path = name.partition(".")
            if head == "sparse_pass":
                yield Import(source, _module(path), at_import)


def _module(path: str) -> str:
    """The module that `sparse_pass.<path>` is in; `__init__` if it is none of the files."""
    parts = path.split(".")
    candidates = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    packages = [f"{candidate}.__init__" for candidate in candidates]
    return next((one for one in (*candidates, *packages) if one in MODULES), "__init__")


IMPORTS = [one for file in FILES for one in our_imports(file)]


def test_every_module_has_its_place() -> None:
    assert {layer(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("source", sorted(ALLOWED))
def test_layers(source: str) -> None:
    allowed = set(ALLOWED[source].split())
    found = {layer(one.target) for one in IMPORTS if layer(one.source) == source}
    assert found <= allowed, f"{source} imports {sorted(found - allowed)}"


def test_no_cycles() -> None:
    """Of the diagram above, and of modules, imports in functions included."""
    list(graphlib.TopologicalSorter({k: set(v.split()) - {k} for k, v in ALLOWED.items()}).static_order())
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for one in IMPORTS:
        edges[one.source].add(one.target)
    list(graphlib.TopologicalSorter(edges).static_order())


def test_nothing_imports_the_package_itself() -> None:
    assert [one for one in IMPORTS if one.target == "__init__"] == []


def test_kernels_are_imported_late() -> None:
    """By functions that run on a GPU: triton and the CUDA libraries are no part of an import."""
    early = [one for one in IMPORTS if layer(one.target) == "kernels" != layer(one.source) and one.at_import]
    assert early == []


def test_dependencies() -> None:
    """The standard library and torch, with what torch itself needs; all else in the one place that it is for."""
    found = set()
    for file in FILES:
        for node, _ in imports_of(file):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if not getattr(node, "level", 0):
                found.update((layer(module_name(file)), name.partition(".")[0]) for name in names)
    foreign = {(layer, name) for layer, name in found if name not in {*sys.stdlib_module_names, "torch"}}
    assert foreign == {
        *((("kernels", name)) for name in ("filelock", "tqdm", "triton")),
        *((("callbacks", name)) for name in ("lightning", "transformers")),
        *((("cli", name)) for name in ("matplotlib", "rich", "timm", "transformers")),
        ("serialize", "yaml"),
    }


OPTIONAL = {"lightning", "matplotlib", "rich", "timm", "tqdm", "transformers", "triton", "yaml"}


def test_optional_packages_are_imported_late() -> None:
    """They may be missing: each is imported by the function that needs it."""
    for file in FILES:
        if layer(module_name(file)) == "kernels":
            continue  # triton; itself imported late
        for node, at_import in imports_of(file):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not (at_import and {name.partition(".")[0] for name in names} & OPTIONAL), file


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


SHORT = {"apply", "cli", "dynamo", "graph", "kernels", "ops", "plan", "predict", "vocabulary", "watch"} | {
    "callbacks",
    "doctor",
    "metrics",
    "phases",
    "prune",
    "registered",
    "schedule",
    "serialize",
    "shards",
    "suggest",
    "verify",
}
"""Where every function is held to the limits below."""


@pytest.mark.parametrize("file", [file for file in FILES if layer(module_name(file)) in SHORT], ids=module_name)
def test_functions_are_short(file: Path) -> None:
    """Sixty lines and six parameters, but for the kernels in Triton."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.FunctionDef) or any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        parameters = [one.arg for one in (*node.args.args, *node.args.kwonlyargs) if one.arg not in ("self", "cls")]
        assert (node.end_lineno or 0) - node.lineno < 60, node.name
        assert len(parameters) <= 6, node.name


def test_only_apply_edits() -> None:
    """What changes a graph is called in one folder; finding and planning read it."""
    edits = re.compile(r"\.(erase_node|replace_all_uses_with|replace_input_with|update_arg|inserting_before|prepend)\(")
    found = {layer(module_name(file)) for file in FILES if edits.search(file.read_text())}
    assert found == {"apply"}


# What is public


def test_public_names() -> None:
    """The contract's, in order, and no more."""
    assert set(sp.__all__) == set(CONTRACT) | RECORDS
    assert list(sp.__all__) == sorted(sp.__all__)


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(name: str) -> None:
    signature = inspect.signature(getattr(sp, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == CONTRACT[name]


@pytest.mark.parametrize("name", [*CONTRACT, *sorted(RECORDS)])
def test_documented(name: str) -> None:
    """Each public name says what it is and names its parameters; fields of records say what they hold."""
    public: Any = getattr(sp, name)
    text = inspect.getdoc(public) or ""
    assert len(text) > 40
    assert not text.startswith(f"{name}("), "that is the docstring which dataclass makes"
    if name in ("ActivationSparsity", "GradientSparsity", "WeightSparsity"):
        # Field docstrings, which only the source has.
        text += inspect.getsource(public)
        (body,) = ast.parse(inspect.getsource(public)).body
        after = zip(body.body, body.body[1:], strict=False)  # type: ignore[attr-defined]
        bare = [node.target.id for node, doc in after if isinstance(node, ast.AnnAssign) and not _is_text(doc)]
        assert bare == []
    if name in CONTRACT:
        for parameter in inspect.signature(public).parameters:
            assert parameter in text, parameter
    else:
        for method, value in vars(public).items():
            assert method.startswith("_") or not callable(value) or value.__doc__, method


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_public_names_are_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in sp.__all__ if name not in page] == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# What an import may do


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    """A CPU-only torch has no triton; a context on every GPU would cost memory, and a later fork would break."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "def refuse(*args): raise AssertionError('CUDA was asked for')\n"
        "torch.cuda._lazy_init = torch.cuda.current_device = refuse\n"
        "torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse\n"
        "import sparse_pass\n"
        "assert sparse_pass.mask24(torch.ones(4, 4)).sum() == 8\n"
        "assert torch.ops.sparse_pass.mask24(torch.ones(4, 4), 'greedy').sum() == 8\n"
        "assert not [name for name in sys.modules if name.startswith('sparse_pass.kernels.')]\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


# The tests


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_imports_a_test() -> None:
    """What several files need is in a folder of helpers, which pytest's `pythonpath` names."""
    for file in TESTS:
        for node, _ in imports_of(file):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            assert not any(name.startswith("test_") for name in names), file


def test_each_test_has_its_place() -> None:
    """One of the folders that CONTRIBUTING names; and a name of its own, by which pages name it without the folder."""
    folders = {"tests", "helpers", "fakes", "unit", "graphs", "exact", "torch_compile", "distributed", "gpu"}
    assert {file.parent.name for file in TESTS} == folders
    names = [file.name for file in TESTS if file.name != "conftest.py"]
    assert len(set(names)) == len(names)
