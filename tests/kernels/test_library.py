# SPDX-License-Identifier: Apache-2.0
"""The registered op under torch.compile and torch.library.opcheck."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from cna_kernels import EAGER, act_and_mul_scaled
from tests.kernels.cases import Tables, make_tables, make_x

OP = torch.ops.cna.act_and_mul_scaled.default


class GatedMLP(torch.nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(hidden, 2 * size, bias=False)
        self.down = torch.nn.Linear(size, hidden, bias=False)

    def forward(self, x: torch.Tensor, tables: Tables) -> torch.Tensor:
        down: torch.Tensor = self.down(act_and_mul_scaled(self.gate_up(x), *tables, "silu"))
        return down


@torch.inference_mode()
def test_one_node_in_one_graph_for_every_number_of_rows() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def counting(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    mlp = GatedMLP(16, 33)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=counting)
    tables = make_tables(33, "distinct", 50)
    for rows in (2, 7, 50):
        x = torch.randn(rows, 16)
        assert torch.equal(compiled(x, tables), mlp(x, tables))
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    assert [target for target in targets if "act_and_mul_scaled" in str(target)] == [OP]


@torch.inference_mode()
def test_functionalized_graph_equals_eager() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    mlp = GatedMLP(16, 33)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    tables = make_tables(33, "padded", 9)
    x = torch.randn(9, 16)
    assert torch.equal(compiled(x, tables), mlp(x, tables))


@pytest.mark.parametrize("activation", sorted(EAGER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, activation: str) -> None:
    arguments = (make_x(33, 9, dtype, pad=3), *make_tables(33, "padded", 9), activation)
    torch.library.opcheck(OP, arguments)
