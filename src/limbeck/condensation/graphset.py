"""A condensed set of graphs: disjoint unions of computation trees with their roots, class and support; or real graphs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import storage
from limbeck.data.graphs import Graph, union
from limbeck.errors import MISFITS, UserError
from limbeck.outcome import Artifact

MOST = 256
"""Types of nodes, and classes, that one byte can tell apart."""

LARGEST = 2**15
"""Nodes of a graph whose edges two 16-bit numbers can name."""


@dataclass(frozen=True)
class Member:
    """One training graph.

    Attributes:
        graph: its edges lead from children to parents in trees, both ways in real graphs.
        label: its class.
        roots: positions of the nodes that are summed; None for all (real graphs).
        support: in how many real graphs its trees occur together; 1 for real graphs.
    """

    graph: Graph
    label: int
    roots: Tensor | None = None
    support: float = 1.0

    def bytes(self) -> int:
        """As a real graph is counted, and four bytes for the support of mined trees (roots need none: they have no outgoing edge)."""
        if self.roots is None:
            return self.graph.bytes()
        return len(self.graph.types) + 4 * self.graph.edges.shape[1] + 13


class GraphSet(Artifact):
    """Graphs for training, with how often each should be drawn.

    Args:
        members: at least one of each class.
        classes: their names.
        node_types: how many types of nodes there are.
        weighted: draw members in proportion to their support, with replacement; else each once an epoch.
    """

    soft = False
    targets = None

    def __init__(self, members: Sequence[Member], classes: Sequence[str], node_types: int, weighted: bool = False) -> None:
        self.members, self.classes, self.node_types, self.weighted = list(members), tuple(classes), node_types, weighted
        if max(node_types, len(self.classes)) > MOST or any(len(member.graph.types) > LARGEST for member in self.members):
            raise UserError(
                f"a stored set holds at most {MOST} types of nodes and classes, and graphs of at most {LARGEST} nodes",
                "merge rare types of nodes, or leave large graphs out",
            )
        have = {member.label for member in self.members}
        missing = [name for number, name in enumerate(self.classes) if number not in have]
        if missing:
            raise UserError(
                f"no graph of the class {missing[0]!r} fits into the budget",
                "raise condense.per_class, or lower the support that is asked for",
            )

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What a graph network is called with, and the classes `(B,)`, of the members at `index`."""
        chosen = [self.members[i] for i in index.tolist()]
        starts = itertools.accumulate((len(m.graph.types) for m in chosen), initial=0)
        roots = [(torch.arange(len(m.graph.types)) if m.roots is None else m.roots) + start for m, start in zip(chosen, starts)]
        inputs: dict[str, Any] = {**union([m.graph for m in chosen]), "count": len(chosen), "roots": torch.cat(roots)}
        return inputs, torch.tensor([m.label for m in chosen])

    def draw(self, count: int) -> Tensor:
        """`(count,)` positions for one epoch, from torch's global generator."""
        if not self.weighted:
            return torch.randperm(len(self))[:count]
        return torch.multinomial(torch.tensor([m.support for m in self.members]), count, replacement=True)

    # ---- the same face as a SyntheticSet ----

    def as_stored(self) -> GraphSet:
        """Itself: nothing is rounded in a file."""
        return self

    def bytes(self) -> dict[str, int]:
        """Bytes by part."""
        return {"images": sum(m.bytes() for m in self.members)}

    def size(self) -> int:
        """All stored bytes."""
        return sum(self.bytes().values())

    def fingerprint(self) -> str:
        """A digest of everything that students see."""
        return storage.fingerprint([storage.tensors_fingerprint(self._tensors()), self.weighted])

    def _tensors(self) -> dict[str, Tensor]:
        nodes = [len(m.graph.types) for m in self.members]
        mined = [m for m in self.members if m.roots is not None]
        if mined and len(mined) != len(self.members):
            raise UserError("a set mixes real graphs and mined trees", "keep them in two sets")
        edges = [m.graph.edges if mined else m.graph.edges[:, m.graph.edges[0] <= m.graph.edges[1]] for m in self.members]
        tensors = {
            "types": torch.cat([m.graph.types for m in self.members]).to(torch.uint8),
            "edges": torch.cat(edges, 1).to(torch.int16),
            "nodes": torch.tensor(nodes, dtype=torch.int32),
            "edge_counts": torch.tensor([e.shape[1] for e in edges], dtype=torch.int32),
            "labels": torch.tensor([m.label for m in self.members], dtype=torch.uint8),
        }
        if mined:
            tensors["support"] = torch.tensor([m.support for m in self.members], dtype=torch.float32)
        return tensors

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write `set.safetensors`, `set.json` and `README.md` into a folder."""
        folder = Path(folder)
        checksum = storage.save_tensors(folder / "set.safetensors", self._tensors())
        if card:
            storage.write_text(folder / "README.md", card)
        note = {
            "kind": "limbeck graph set",
            "version": 1,
            "classes": list(self.classes),
            "node_types": self.node_types,
            "weighted": self.weighted,
            "samples": len(self),
            "bytes": self.bytes(),
        }
        storage.write_json(folder / "set.json", {**note, **(extra or {}), "sha256": checksum})

    @classmethod
    def load(cls, folder: str | Path) -> GraphSet:
        """Open what `save` wrote.

        Raises:
            UserError: it is no such folder, or a file is missing, torn or altered.
        """
        folder = Path(folder)
        folder = folder / "dataset" if (folder / "dataset" / "set.json").is_file() else folder
        if not (folder / "set.json").is_file():
            raise UserError(f"there is no set of graphs in {folder}", "name the folder of a run, or its dataset/ folder")
        try:
            note = json.loads((folder / "set.json").read_text("utf-8"))
            t = storage.load_tensors(folder / "set.safetensors", note["sha256"])
            mined = "support" in t
            types = t["types"].long().split(t["nodes"].tolist())
            edges = t["edges"].long().split(t["edge_counts"].tolist(), 1)
            members = []
            for number, (kind, pairs, label) in enumerate(zip(types, edges, t["labels"].tolist())):
                if mined:
                    leaves = torch.ones(len(kind), dtype=torch.bool)
                    leaves[pairs[0]] = False  # whatever has a parent is no root
                    members.append(Member(Graph(kind, pairs), label, leaves.nonzero()[:, 0], float(t["support"][number])))
                else:
                    loops = pairs[0] == pairs[1]
                    members.append(Member(Graph(kind, torch.cat([pairs, pairs[:, ~loops].flip(0)], 1)), label))
            return cls(members, note["classes"], note["node_types"], note["weighted"])
        except MISFITS as error:
            raise UserError(f"{folder / 'set.json'} is damaged: {error!r}", "restore it, or run the recipe again") from None

    def geometric(self) -> list[Any]:
        """The members as `torch_geometric.data.Data` (x, edge_index, y, roots as a mask `r`, weight).

        Raises:
            UserError: PyTorch Geometric is not installed.
        """
        try:
            from torch_geometric.data import Data
        except ImportError:
            raise UserError("PyTorch Geometric is not installed", "`pip install 'limbeck[graphs]'`") from None
        made = []
        for m in self.members:
            mask = torch.ones(len(m.graph.types), dtype=torch.bool)
            if m.roots is not None:
                mask = torch.zeros_like(mask).index_fill_(0, m.roots, True)
            made.append(Data(x=m.graph.types, edge_index=m.graph.edges, y=torch.tensor([m.label]), r=mask, weight=m.support))
        return made
