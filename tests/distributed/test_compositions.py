"""How people distribute training, on two and four ranks on CPUs: each composition against one process.

The compositions are in `data_parallel`, `tensor_parallel`, `pipelines`, `mixed_precision` and `checkpoints`; this file
is also the program of their ranks, see `ranks`. Starting ranks takes as long as several compositions.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import checkpoints
import data_parallel
import mixed_precision
import pipelines
import tensor_parallel
from ranks import CONFIG, W24, Network, batch, launch, main, network

import sparse_pass as sp
from sparse_pass.shards import Sharding, Split

TWO = {**data_parallel.TWO, **mixed_precision.TWO, **tensor_parallel.TWO, **pipelines.TWO, **checkpoints.TWO}
FOUR = {**data_parallel.FOUR, **tensor_parallel.FOUR}


def test_compositions() -> None:
    launch(__file__, {2: TWO, 4: FOUR})


def test_ranks_agree_on_a_refusal() -> None:
    """Of 136 rows in three, the last rank has 44, which alone would do."""
    rows = Sharding((136, 64), (Split(0, 3, "tp"),))
    assert "3 shards of 46 rows" in str(rows.why_tiles_are_split())
    assert Sharding((44, 64), (Split(0, 6, "tp"),)).why_tiles_are_split() is None  # 8 and 4
    assert Sharding((32, 64), (Split(0, 2, "dp"), Split(0, 4, "tp"))).why_tiles_are_split() is None
    assert Sharding((24, 64), (Split(0, 2, "dp"), Split(0, 4, "tp"))).why_tiles_are_split() is not None


def test_one_config_for_all_stages() -> None:
    """The names of all stages are names in the whole, which may have no data."""
    with torch.device("meta"):
        whole = Network()
    stage = pipelines.Stage(network(), (0,), head=False)
    sp.sparse_backend(CONFIG, model=stage, whole=whole)
    with pytest.raises(ValueError, match=r"give the model as whole="):
        sp.sparse_backend(CONFIG, model=stage)
    with pytest.raises(ValueError, match="names no linear weight of Network"):
        sp.sparse_backend({"blocks.2.fc1": W24}, model=stage, whole=whole)
    with pytest.raises(ValueError, match="give the part, too"):
        sp.sparse_backend(CONFIG, whole=whole)
    report = sp.prune_(stage, CONFIG, whole=whole)
    assert [site.fqn for site in report.sites] == pipelines.NAMED[0]
    assert torch.equal(stage.blocks["0"].fc1.weight != 0, sp.mask24(network().blocks[0].fc1.weight))


def test_a_captured_backward_is_no_graph_of_its_own() -> None:
    """Compiled autograd hands the backward to the same backend: what is 2:4 in it was rewritten with the forward."""
    model = network()
    backend = sp.sparse_backend(CONFIG, model=model, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        run(batch(0)[0]).sum().backward()
    assert (backend.report.graphs, backend.report.inference_graphs, backend.report.notes) == (1, 0, ())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_dtype_that_no_weight_has(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected the floating point dtype that training saw"):
        sp.prune_(network(), CONFIG, dtype=dtype)


if __name__ == "__main__":
    main({**TWO, **FOUR})
