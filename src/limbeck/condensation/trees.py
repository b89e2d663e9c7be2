"""Computation trees: what a message-passing network of L layers sees of each node; counting them, and mining those that occur together.

The tree of depth 0 is a node's type. The tree of depth d is the node's type over the trees of depth d - 1 of all its neighbours, also of
the one it was reached from (so that it mirrors message passing). Equal trees get equal numbers: isomorphism is a dictionary lookup, and
the work is linear in the number of edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from limbeck.data.graphs import Graph
from limbeck.errors import UserError


class Forest:
    """Numbers for rooted labelled trees; two nodes have the same number exactly when their trees are isomorphic.

    Attributes:
        shapes: for each number, the root's type and the sorted numbers of its children.
        steps: neighbours looked at so far, the measure of work.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, tuple[int, ...]]] = []
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        self.steps = 0

    def number(self, kind: int, children: tuple[int, ...] = ()) -> int:
        """The number of a tree with a root of type `kind` over `children` (numbers, in any order)."""
        shape = (kind, tuple(sorted(children)))
        if shape not in self._numbers:
            self._numbers[shape] = len(self.shapes)
            self.shapes.append(shape)
        return self._numbers[shape]

    def trees(self, graph: Graph, hops: int) -> list[int]:
        """The numbers of the depth-`hops` trees of all nodes."""
        types = graph.types.tolist()
        near: list[list[int]] = [[] for _ in types]
        for source, target in graph.edges.T.tolist():
            near[target].append(source)
        now = [self.number(kind) for kind in types]
        for _ in range(hops):
            now = [self.number(types[v], tuple(now[u] for u in near[v])) for v in range(len(types))]
            self.steps += graph.edges.shape[1]
        return now

    def size(self, number: int) -> int:
        """Nodes of a tree."""
        total, stack = 0, [number]
        while stack:
            total += 1
            stack += self.shapes[stack.pop()][1]
        return total

    def rebuild(self, numbers: Sequence[int]) -> tuple[Graph, torch.Tensor]:
        """The disjoint union of trees as a graph whose edges lead from children to parents, and the positions of the roots."""
        types: list[int] = []
        pairs: list[tuple[int, int]] = []
        roots = []
        for number in numbers:
            roots.append(len(types))
            stack = [(number, -1)]
            while stack:
                tree, parent = stack.pop()
                kind, children = self.shapes[tree]
                own = len(types)
                types.append(kind)
                if parent >= 0:
                    pairs.append((own, parent))
                stack += [(child, own) for child in reversed(children)]
        edges = torch.tensor(pairs, dtype=torch.long).T if pairs else torch.empty(2, 0, dtype=torch.long)
        return Graph(torch.tensor(types), edges), torch.tensor(roots)


def frequent_sets(transactions: Sequence[set[int]], support: float, longest: int = 3) -> dict[frozenset[int], int]:
    """Sets of trees that occur together in at least a share `support` of the transactions, and in how many (FP-growth of mlxtend).

    Trees that are rarer by themselves cannot belong to such a set and are dropped first, which changes nothing but the time.

    Args:
        transactions: the distinct trees of each graph.
        support: in (0, 1].
        longest: greatest size of a set.

    Raises:
        UserError: mlxtend is not installed.
    """
    try:
        from mlxtend.frequent_patterns import fpgrowth
    except ImportError:
        raise UserError("mining frequent trees needs mlxtend", "`pip install 'limbeck[graphs]'`") from None
    import numpy as np
    import pandas as pd

    counts: dict[int, int] = {}
    for items in transactions:
        for item in items:
            counts[item] = counts.get(item, 0) + 1
    least = max(1, math.ceil(support * len(transactions) - 1e-9))  # 0.07 * 100 is a little above 7
    columns = sorted(item for item, count in counts.items() if count >= least)
    if not columns:
        return {}
    place = {item: i for i, item in enumerate(columns)}
    table = np.zeros((len(transactions), len(columns)), dtype=bool)
    for row, items in enumerate(transactions):
        table[row, [place[item] for item in items if item in place]] = True
    # Half a graph below the least count: the share is rounded up again in there.
    share = (least - 0.5) / len(transactions)
    found = fpgrowth(pd.DataFrame(table, columns=columns), min_support=share, use_colnames=True, max_len=longest)
    sets, shares = found["itemsets"].tolist(), found["support"].tolist()
    return {frozenset(s): round(share * len(transactions)) for s, share in zip(sets, shares)}
