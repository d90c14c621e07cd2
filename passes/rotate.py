"""Rotate activations, so that no channel is much larger than the others when weights are quantised (QuaRot, https://arxiv.org/abs/2404.00456).

    %h = embedding(%ids, @embed)                  %h = embedding(%ids, @embed Q)
    %n = rms_norm(%h, @norm)                      %n = rms_norm(%h, 1)
    %q = linear(%n, @q)                       ->  %q = linear(%n, @q diag(norm) Q)
    %y = experts(%n, ..., @up, @down)             %y = experts(%n, ..., @up diag(norm) Q, Q^T @down)
    %h1 = add(%h, %y)                             %h1 = add(%h, %y)

The function stays as it is: an RMS norm does not see a rotation once its weight is in the matrices that read it. `residual` rotates the
residual stream, `heads` the values of attention in each head (Q2 between the projections of values and output). Q is a Hadamard matrix
with random signs where the size is a power of two, otherwise (m * 2^a, m odd) the Kronecker product of a random orthogonal m x m matrix
and a Hadamard matrix of 2^a.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.folding import READS, owned, times, value_paths
from moec.compiler.ir import Graph, Node
from moec.compiler.model import Model
from moec.compiler.weights import Edit


@dataclass(frozen=True)
class Rotate:
    """Rotations; without any nothing changes.

    Args:
        residual: rotate the residual stream.
        heads: rotate the values of attention within each head.
        untie: where the embedding is the projection to the logits too, make two of it, which costs its size again.
        seed: of the signs.
    """

    residual: bool = False
    heads: bool = False
    untie: bool = False
    seed: int = 0

    def run(self, model: Model, context: Context) -> Model:
        if self.residual or self.heads:
            require_no_factors(model.graph, "rotate")
        if self.residual:
            model = self._residual(model)
        if self.heads:
            model = self._heads(model, context)
        return model

    def _heads(self, model: Model, context: Context) -> Model:
        edits: dict[str, Edit] = {}
        for path in value_paths(model.graph):
            value, output, bias = path.value.inputs[1], path.output.inputs[1], (*path.value.inputs[2:3], "")[0]
            if bias and not owned(model.graph, bias):
                continue
            q = rotation(path.size, self.seed)
            inward = torch.block_diag(*[q.T] * path.kv_heads)
            edits |= {name: times(model.weights, name, left=inward) for name in (value, bias) if name}
            edits[output] = times(model.weights, output, right=torch.block_diag(*[q] * path.heads))
        context.note("rotate", heads=len(edits) // 2)
        if not edits:
            raise MoecError("rotate: heads: no attention of the model has values that go straight from one linear layer to another")
        return model.edited(model.graph, edits)

    def _residual(self, model: Model) -> Model:
        model = self._untied(model)
        graph = model.graph
        stream = _Stream(graph)
        q = rotation(stream.size, self.seed)
        edits: dict[str, Edit] = {name: times(model.weights, name, right=q) for name in stream.tables}
        for name in stream.norms:
            offset = float(next(n for n in graph.users[name]).attrs.get("offset", 0.0))
            edits[name] = lambda _, offset=offset: torch.full((stream.size,), 1.0 - offset, dtype=torch.float64, device="cpu")  # type: ignore[misc]
        for name in {*stream.read, *stream.written}:
            right = None
            if name in stream.read:
                norm, offset = stream.read[name]
                weight = model.load(norm).double() + offset if norm else torch.ones(stream.size, dtype=torch.float64, device="cpu")
                right = weight[:, None] * q
            edits[name] = times(model.weights, name, left=q.T if name in stream.written else None, right=right)
        for name in stream.biases:
            edits[name] = times(model.weights, name, right=q)  # a bias [D] or [E, D] of what is written
        return model.edited(graph, edits)

    def _untied(self, model: Model) -> Model:
        """The model with a projection to the logits of its own."""
        graph = model.graph
        for table in [n.inputs[1] for n in graph.nodes if n.op == "embedding"]:
            projections = [n for n in graph.users[table] if n.op == "linear"]
            if not projections:
                continue
            if not self.untie:
                size = "x".join(map(str, graph.params[table].type.shape))
                raise MoecError(
                    f"rotate: @{table} [{size}] is both embedding and projection to the logits; add untie: true to store it twice"
                )
            twin = replace(graph.params[table], name=f"{table}.logits")
            base = model.weights
            nodes = [replace(n, inputs=(n.inputs[0], twin.name, *n.inputs[2:])) if n in projections else n for n in graph.nodes]
            model = model.with_params([twin], {twin.name: lambda expert, base=base, table=table: base.load(table, expert)})  # type: ignore[misc]
            model = Model(model.graph.with_nodes(nodes), model.weights)
            graph = model.graph
        return model


def rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix [size, size], float64, whose columns spread every channel over many."""
    generator = torch.Generator("cpu").manual_seed(seed)
    odd = size // (size & -size)
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(h) * odd < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / 2**0.5
    if odd > 1:
        mix = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64, device="cpu"))[0]
        h = torch.kron(mix.contiguous(), h)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    return signs[:, None] * h


class _Stream:
    """The residual stream of a graph: the values that a rotation turns, and what has to change for it.

    Attributes:
        size: D.
        tables: embeddings, whose columns turn.
        norms: weights of norms that read the stream.
        read: matrices whose columns turn, with the norm before them (its weight's name and offset), or "" and 0.
        written: matrices whose rows turn.
        biases: of what is written.

    Raises:
        MoecError: something in the graph reads or writes the stream in a way that a rotation changes; the message names it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tables, self.norms = list[str](), list[str]()
        self.read, self.written, self.biases = dict[str, tuple[str, float]](), list[str](), list[str]()
        starts = [n for n in graph.nodes if n.op == "embedding"]
        if not starts:
            raise MoecError("rotate: the model has no embedding, where a residual stream would start")
        self.size = int(starts[0].outputs[0].type.shape[-1])
        self.turned = {n.outputs[0].name for n in starts}
        while any([self._spread(node) for node in graph.nodes]):  # noqa: C419  # every node is looked at
            pass
        for node in graph.nodes:
            self._use(node)

    def _spread(self, node: Node) -> bool:
        """Whether sums and per-token factors make more values turn: forward from their inputs, backward to what is added."""
        if node.op not in ("aten.add.Tensor", "aten.mul.Tensor") or node.attrs.get("alpha", 1) != 1:
            return False
        values = {v for v in (*node.inputs, node.outputs[0].name) if self._wide(v)}
        if node.op == "aten.mul.Tensor" and len(values) == 3:
            return False  # a product of two channels; `_use` declines it if they turn
        before = len(self.turned)
        if self.turned & values:
            self.turned |= values
        return len(self.turned) > before

    def _wide(self, value: str) -> bool:
        return value not in self.graph.params and self.graph.type_of(value).shape[-1] == self.size

    def _use(self, node: Node) -> None:
        """Note what a node needs changed."""
        turned = [v for v in node.inputs if v in self.turned]
        writes = any(o.name in self.turned for o in node.outputs)
        if node.op == "embedding":
            self._take(node, node.inputs[1])
            self.tables.append(node.inputs[1])
        elif node.op == "rms_norm" and turned and not writes:
            self._norm(node)
        elif node.op in READS:
            if turned and turned != [node.inputs[0]]:
                raise self._decline(node, "reads the residual stream as a routing weight")
            if turned:
                self._reads(node, "", 0.0)
            if writes:
                self._writes(node)
        elif node.op in ("aten.add.Tensor", "aten.mul.Tensor") and writes:
            wide = [v for v in node.inputs if self._wide(v) or v in self.graph.params]
            if len(wide) != (2 if node.op == "aten.add.Tensor" else 1) or any(v not in self.turned for v in wide):
                raise self._decline(node, "adds or multiplies channels of the residual stream by something that cannot turn with it")
        elif turned or writes:
            raise self._decline(node, f"{node.op} on the residual stream does not commute with a rotation")
        if any(o in self.turned for o in self.graph.outputs):
            raise MoecError("rotate: the residual stream is a result of the model; it cannot be rotated")

    def _norm(self, node: Node) -> None:
        weight, offset = (*node.inputs[1:2], "")[0], float(node.attrs.get("offset", 0.0))
        if weight:
            self._take(node, weight)
            self.norms.append(weight)
        for reader in self.graph.users.get(node.outputs[0].name, ()):
            if reader.op not in READS or reader.inputs.count(node.outputs[0].name) != 1:
                raise self._decline(reader, "reads a norm of the residual stream, and is no matrix")
            self._reads(reader, weight, offset)

    def _reads(self, node: Node, norm: str, offset: float) -> None:
        name = node.inputs[READS[node.op]]
        self._take(node, name)
        self.read[name] = (norm, offset)

    def _writes(self, node: Node) -> None:
        names = [node.inputs[1], *node.inputs[2:3]] if node.op == "linear" else [node.inputs[4], *node.inputs[6:7]]
        for at, name in enumerate(n for n in names if n):
            self._take(node, name)
            (self.biases if at else self.written).append(name)

    def _take(self, node: Node, name: str) -> None:
        if not owned(self.graph, name):
            raise self._decline(node, f"@{name} is used elsewhere too, or is quantised already")

    def _decline(self, node: Node, why: str) -> MoecError:
        return MoecError(f"rotate: residual: %{node.name}: {why}; leave residual off for this model")


PASS = Rotate
