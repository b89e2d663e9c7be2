"""Mining of computation trees over ever more graphs: the time must grow in proportion.

    python benchmarks/mining.py [--quick]

Graphs are syntax trees of Python's own library, repeated. Checked first: on r copies of the graphs every set of trees is found again, r
times as often; and looking at r times as many edges takes r times as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from common import middle, parser, row, say, spent

from limbeck.condensation.trees import Forest, frequent_sets
from limbeck.data import open_data
from limbeck.data.graphs import Graph

HOPS, SUPPORT, LONGEST = 2, 0.2, 3
COUNTS = (1000, 2000, 5000, 10000)


def mine(graphs: Sequence[Graph]) -> tuple[dict[frozenset[int], int], int]:
    """Frequent sets of trees, and how many neighbours were looked at."""
    forest = Forest()
    transactions = [set(forest.trees(graph, HOPS)) for graph in graphs]
    return frequent_sets(transactions, SUPPORT, LONGEST), forest.steps


def slope(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds over log counts; 1 is proportional."""
    x, y = [math.log(n) for n in counts], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def check(graphs: Sequence[Graph], copies: int) -> None:
    """Copies change counts and work by their number, and nothing else."""
    once, steps = mine(graphs)
    often, more = mine([graph for _ in range(copies) for graph in graphs])
    assert once and {trees: copies * count for trees, count in once.items()} == often
    assert more == copies * steps


def main() -> None:
    """Print one line of JSON."""
    quick = parser(__doc__).parse_args().quick
    graphs = open_data("stdlib-graphs").train.graphs  # type: ignore[attr-defined]
    check(graphs[:60], 3)
    counts = (60, 120) if quick else COUNTS
    many = [graphs[i % len(graphs)] for i in range(max(counts))]
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(1 if quick else 3):
        for count in counts:
            times[count].append(spent(lambda count=count: mine(many[:count])))
    seconds = {count: middle(times[count]) for count in counts}
    result: dict[str, Any] = {
        "hops": HOPS,
        "support": SUPPORT,
        "longest": LONGEST,
        "seconds": {str(count): round(value, 3) for count, value in seconds.items()},
        "graphs_a_second": round(counts[-1] / seconds[counts[-1]]),
        "slope": round(slope(counts, list(seconds.values())), 3),
        "targets": {"slope": 1.1},
    }
    title = "mining of computation trees: slope of log time over log number of graphs"
    note = f"{result['graphs_a_second']} graphs/s at {counts[-1]} graphs"
    say("mining", quick, [row(title, result["slope"], 1.1, floor="1: linear", note=note)], **result)


if __name__ == "__main__":
    main()
