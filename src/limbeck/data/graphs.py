"""Graphs as data: syntax trees of Python's standard library, and data sets of PyTorch Geometric from a local folder.

A graph has V nodes with a type each, and E edges; both directions of an edge are listed. A batch is one disconnected graph:
`{"x": (V,), "edge_index": (2, E), "batch": (V,)}`, which a network takes as keyword arguments.
"""

from __future__ import annotations

import ast
import importlib.util
import tempfile
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.data.source import Source
from limbeck.data.split import Split
from limbeck.errors import UserError
from limbeck.places import user_path

NODE_TYPES = tuple(sorted(name for name, kind in vars(ast).items() if isinstance(kind, type) and issubclass(kind, ast.AST)))
"""Names of the node types of this Python's syntax trees."""


@dataclass(frozen=True)
class Graph:
    """One graph.

    Attributes:
        types: `(V,)` int64, the type of each node.
        edges: `(2, E)` int64, sources above targets; an undirected edge stands there twice.
    """

    types: Tensor
    edges: Tensor

    def bytes(self) -> int:
        """Stored bytes: one a node, four an edge (an undirected one counts once), one for the class, eight for the two sizes."""
        return len(self.types) + 4 * int((self.edges[0] <= self.edges[1]).sum()) + 9


class GraphSplit(Split):
    """Graphs held in memory; a batch is their disjoint union.

    Args:
        graphs: the samples.
        labels: `(N,)` classes.
        node_types: how many types of nodes there are.
        files: where each graph comes from, for those who want to know.
    """

    def __init__(self, graphs: Sequence[Graph], labels: Tensor, node_types: int, files: Sequence[str] = ()) -> None:
        if len(graphs) != len(labels):
            raise UserError(f"{len(graphs)} graphs have {len(labels)} labels", "give one label a graph")
        self.graphs, self.labels, self.node_types, self.files = list(graphs), labels, node_types, list(files)

    def __len__(self) -> int:
        return len(self.graphs)

    def batch(self, index: Tensor) -> Batch:
        """The graphs at `index` as one disconnected graph."""
        chosen = [self.graphs[i] for i in index.tolist()]
        labels = None if self.labels is None else self.labels[index.cpu()]
        return Batch(union(chosen), labels, index)

    def subset(self, index: Tensor) -> GraphSplit:
        """The graphs at `index` as a split of their own."""
        files = [self.files[i] for i in index.tolist()] if self.files else ()
        assert self.labels is not None
        return GraphSplit([self.graphs[i] for i in index.tolist()], self.labels[index], self.node_types, files)


def union(graphs: Sequence[Graph]) -> dict[str, Tensor]:
    """`{"x", "edge_index", "batch"}` of several graphs side by side."""
    sizes = torch.tensor([len(g.types) for g in graphs])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])
    edges = torch.cat([g.edges + start for g, start in zip(graphs, starts)], 1)
    return {"x": torch.cat([g.types for g in graphs]), "edge_index": edges, "batch": torch.arange(len(graphs)).repeat_interleave(sizes)}


# ---- syntax trees of the standard library ----


def syntax_graph(tree: ast.AST) -> Graph:
    """The syntax tree of a function as a graph: a node for each syntax node, an edge (both ways) for each parent and child."""
    numbers = {name: i for i, name in enumerate(NODE_TYPES)}
    types: list[int] = []
    pairs: list[tuple[int, int]] = []
    stack: list[tuple[ast.AST, int]] = [(tree, -1)]
    while stack:
        node, parent = stack.pop()
        own = len(types)
        types.append(numbers[type(node).__name__])
        if parent >= 0:
            pairs += [(parent, own), (own, parent)]
        stack += [(child, own) for child in reversed(list(ast.iter_child_nodes(node)))]
    edges = torch.tensor(pairs, dtype=torch.long).T if pairs else torch.empty(2, 0, dtype=torch.long)
    return Graph(torch.tensor(types), edges)


def _files(package: str) -> list[tuple[str, Path]]:
    """The source files of a package and their names inside it, without its tests."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{package!r} is no package that can be found here", "name packages of the standard library, such as email or asyncio"
        )
    found = [(path.relative_to(folder), path) for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py")]
    return sorted((name.as_posix(), path) for name, path in found if not {"test", "tests"} & set(name.parts))


def _functions(path: Path) -> list[ast.AST]:
    try:
        with tokenize.open(path) as file:  # in the encoding that the file declares
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no source of this Python: {error}", "name other packages") from None
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def stdlib_graphs(packages: Sequence[str] = ("email", "asyncio"), least: int = 20, most: int = 150, split_seed: int = 0) -> Source:
    """Syntax trees of functions of Python's standard library; the class is the package (20 to 150 nodes, split by file).

    Args:
        packages: at least two, each once; folders called `test` or `tests` inside them are left out.
        least, most: nodes of the functions that are kept.
        split_seed: of the order in which files go to train (60 %), valid and test (20 % each); no file is in two parts.

    Raises:
        UserError: a package is not there, named twice, or has too few files for three parts; a file cannot be parsed.
    """
    if len(set(packages)) < max(2, len(packages)):
        raise UserError("stdlib-graphs needs at least two packages, each named once", "for example data.args.packages=[email, asyncio]")
    parts: dict[str, tuple[list[Graph], list[int], list[str]]] = {name: ([], [], []) for name in ("train", "valid", "test")}
    for label, package in enumerate(packages):
        found: list[tuple[str, list[Graph]]] = []
        for inside, path in _files(package):
            graphs = [g for g in map(syntax_graph, _functions(path)) if least <= len(g.types) <= most]
            if graphs:
                found.append((f"{package}:{inside}", graphs))
        total, done = sum(len(graphs) for _, graphs in found), 0
        for i in torch.randperm(len(found), generator=generator(split_seed, label)).tolist():
            name, graphs = found[i]
            part = parts["train" if done < 0.6 * total else "valid" if done < 0.8 * total else "test"]
            part[0].extend(graphs)
            part[1].extend([label] * len(graphs))
            part[2].extend([name] * len(graphs))
            done += len(graphs)
    for name, (_, labels, _) in parts.items():
        missing = [package for number, package in enumerate(packages) if number not in labels]
        if missing:
            raise UserError(f"the {name} part has no function of {missing[0]}", "take larger packages, or another split_seed")
    made = {name: GraphSplit(g, torch.tensor(y), len(NODE_TYPES), files) for name, (g, y, files) in parts.items()}
    return Source(made["train"], made["test"], made["valid"], tuple(packages), shape=(len(NODE_TYPES),), note=[least, most, split_seed])


# ---- data sets of PyTorch Geometric ----


def _opened(kind: Any, root: str, name: str) -> Any:
    class Local(kind):
        """The data set as it lies there; nothing is downloaded."""

        def download(self) -> None:
            raise UserError(f"{name}/raw lacks files that PyTorch Geometric wants", "copy the whole set there")

    try:
        return Local(root, name)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds, all about the texts of the set
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the graphs of {name} cannot be read: {why}", "restore its raw files") from None


def read_geometric(path: str, root: str = "") -> Source:
    """A graph classification set of PyTorch Geometric (`TUDataset`) that lies in a local folder; nothing is downloaded.

    Args:
        path: its name, such as NCI1.
        root: the folder that holds a folder of that name, as PyTorch Geometric writes it.

    Raises:
        UserError: PyTorch Geometric or the folder is missing, or nodes have no types.
    """
    try:
        from torch_geometric.datasets import TUDataset
    except ImportError:
        raise UserError("PyTorch Geometric is not installed", "`pip install 'limbeck[graphs]'`") from None
    if not root or not (user_path(root) / path / "raw").is_dir():
        raise UserError(
            f"there is no folder {root or '.'}/{path}/raw", "give data.args.root, the folder in which PyTorch Geometric keeps it"
        )
    with tempfile.TemporaryDirectory(prefix="limbeck-graphs-") as scratch:
        # what PyTorch Geometric keeps beside the raw texts are pickles, which it opens: they are made again where nobody else writes
        (Path(scratch) / path).mkdir()
        (Path(scratch) / path / "raw").symlink_to((user_path(root) / path / "raw").resolve())
        found = _opened(TUDataset, scratch, path)
    if found.num_node_features < 1:
        raise UserError(f"the nodes of {path} have no types", "mining trees needs node types; choose a set with node labels")
    graphs = [Graph(d.x.argmax(1), d.edge_index) for d in found]
    labels = torch.tensor([int(d.y) for d in found])
    classes = tuple(str(c) for c in range(int(labels.max()) + 1))
    return Source(GraphSplit(graphs, labels, found.num_node_features), classes=classes, shape=(found.num_node_features,))
