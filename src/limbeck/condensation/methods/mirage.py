"""Mirage: graphs condensed by counting, without any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.graph_problem import GraphProblem
from limbeck.condensation.graphset import GraphSet, Member
from limbeck.condensation.trees import Forest, frequent_sets
from limbeck.errors import UserError
from limbeck.method import Card, setting


@dataclass
class Mirage(Condenser):
    """The sets of computation trees that often occur together in the graphs of a class, as training graphs of their own.

    A network of L layers sees a graph as the multiset of its nodes' depth-L trees, and few distinct trees cover most nodes. Per class, the
    sets of trees that are frequent (FP-growth over the graphs' distinct trees) become disjoint unions whose roots are summed; sets that are
    frequent in several classes are dropped. The support falls until the budget in bytes is spent, most frequent sets first.
    """

    card = Card(
        id="mirage",
        title="Mirage: model-agnostic graph distillation for graph classification",
        year=2023,
        wing="condensation",
        family="graphs",
        claim="Mining frequent computation trees condenses graphs without training, for any network, better than gradient matching.",
        equation="P_c = FPGrowth({trees of G : G of class c}, theta_c);  train on the unions of the trees in each p of P_c",
        arxiv="2310.09486",
        baseline="random-real",
        deviations=(
            "theta_c is found from the budget by lowering a share of the class step by step. A tree must occur in two graphs. Single-node "
            "trees are skipped, as in the released code."
        ),
    )
    works_on = ("graphs",)

    hops: int = setting(2, "L, depth of the trees (paper: 1 to 3)", at_least=1)
    longest: int = setting(3, "greatest number of trees in a set; keeps FP-growth small", at_least=1)
    supports: tuple[float, ...] = setting(
        (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05), "shares of a class that are tried, highest first", above=0, at_most=1
    )
    drop_shared: bool = setting(True, "leave out sets that are frequent in several classes (paper's Python variant: yes)")
    weighted: bool = setting(True, "draw sets in proportion to their support (paper's C++ variant: yes)")

    def begin(self, problem: GraphProblem) -> GraphSet:  # type: ignore[override]
        self._forest = Forest()
        graphs = problem.train.graphs
        transactions = [set(self._forest.trees(graph, self.hops)) for graph in graphs]
        counts: dict[int, int] = {}
        for items in transactions:
            for item in items:
                counts[item] = counts.get(item, 0) + 1
        kept = {item for item, count in counts.items() if count > 1 and self._forest.shapes[item][1]}
        by_class = [[transactions[i] & kept for i in positions.tolist()] for positions in problem.positions]
        members: list[Member] = []
        for support in self.supports:
            mined = [frequent_sets(own, support, self.longest) for own in by_class]
            chosen = [self._afford(self._distinct(mined, c), c, problem.budget) for c in range(problem.classes)]
            members = [member for own, _ in chosen for member in own]
            self._support = support
            if all(full for _, full in chosen):
                break
        if not members:
            raise UserError(
                f"no set of trees occurs in {min(self.supports):.0%} of a class's graphs",
                "add lower shares to method.supports, or lower method.hops",
            )
        return GraphSet(members, problem.data.classes, problem.input_shape[0], self.weighted)

    def _distinct(self, mined: list[dict[frozenset[int], int]], c: int) -> list[tuple[frozenset[int], int]]:
        """The frequent sets of a class, most frequent first; ties by their trees, so that the order is one."""
        others = {s for number, found in enumerate(mined) if number != c for s in found} if self.drop_shared else set()
        own = [(s, count) for s, count in mined[c].items() if s not in others]
        return sorted(own, key=lambda pair: (-pair[1], len(pair[0]), sorted(pair[0])))

    def _afford(self, found: list[tuple[frozenset[int], int]], label: int, budget: float) -> tuple[list[Member], bool]:
        """As many sets as the budget pays for, and whether one had to be left out."""
        members, spent, full = [], 0, False
        for trees, count in found:
            graph, roots = self._forest.rebuild(sorted(trees))
            member = Member(graph, label, roots, float(count))
            if spent + member.bytes() > budget:
                full = True
                continue
            spent += member.bytes()
            members.append(member)
        return members, full

    def figures(self, set: GraphSet, problem: Any) -> dict[str, float]:  # type: ignore[override]
        """The support that was reached, how many distinct trees there are, and the share of the nodes that the commonest tenth covers."""
        counts: dict[int, int] = {}
        for graph in problem.train.graphs:
            for tree in self._forest.trees(graph, self.hops):
                counts[tree] = counts.get(tree, 0) + 1
        ranked = sorted(counts.values(), reverse=True)
        share = sum(ranked[: max(1, len(ranked) // 10)]) / sum(ranked)
        return {
            "support": self._support,
            "distinct_trees": len(ranked),
            "commonest_tenth": share,
            "share_of_bytes": set.size() / sum(problem.sizes),
        }
