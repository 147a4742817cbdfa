"""2:4 sparse training for torch.compile, without touching the model.

import sparse_pass as sp

config = {"blocks.*.mlp.fc1": sp.WeightSparsity(), "blocks.*.mlp.fc2": sp.WeightSparsity()}
model = torch.compile(model, backend=sp.sparse_backend(config, model=model))
"""

from .backend import sparse_backend
from .config import ActivationSparsity, GradientSparsity, WeightSparsity
from .explain import explain
from .from_torchao import config_from_torchao
from .graph_pass import SparsePass
from .inductor import inductor_options
from .metrics import Metrics
from .one_graph import rewrite
from .ops.definitions import mask24
from .prune import prune_
from .report import Report, Site
from .schedule import Schedule
from .serialize import config_from_dict, config_to_dict, load_config
from .suggest import suggest
from .verify import verify24

__all__ = [
    "ActivationSparsity",
    "GradientSparsity",
    "Metrics",
    "Report",
    "Schedule",
    "Site",
    "SparsePass",
    "WeightSparsity",
    "config_from_dict",
    "config_from_torchao",
    "config_to_dict",
    "explain",
    "inductor_options",
    "load_config",
    "mask24",
    "prune_",
    "rewrite",
    "sparse_backend",
    "suggest",
    "verify24",
]

__version__ = "0.1.0"
