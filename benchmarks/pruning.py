"""Structural pruning: what limbeck adds to torch-pruning, on which it stands.

    python benchmarks/pruning.py [--quick]

The same network (resnet32x4, random weights) loses 40 % of its channels. limbeck: `find_groups` (torch-pruning's tracing, and for every
group the proof that removing units is the same as no longer reading them), group magnitudes, one global threshold, `removed`.
torch-pruning: its `DependencyGraph` and groups, the same magnitudes by its `GroupMagnitudeImportance`, its `BasePruner` with a global
threshold. Limbeck's overhead is mostly the proof, which torch-pruning does not make: it is also timed alone.

Checked first: without every second unit of one group, both give the same outputs and the same number of weights. Floor: tracing, once
forward and backward of one picture, which no one who follows the graph can save.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from common import absent, in_turn, milliseconds, over, parser, resnets, row, say
from peers import Absent, need, version
from torch import Tensor, nn

from limbeck.structure import pruning
from limbeck.structure.pruning.scores import magnitude
from limbeck.structure.pruning.thresholds import floors, global_threshold

RATIO = 0.4


def ours(network: nn.Module, x: Tensor, ratio: float) -> nn.Module:
    """Groups, scores, threshold, cut."""
    groups = pruning.find_groups(network, x, ("channels",))
    scores = {group.name: magnitude(network, group) for group in groups}
    return pruning.removed(network, groups, global_threshold(scores, ratio, floors(scores, 0.1)))


def theirs(library: Any, network: nn.Module, x: Tensor, ratio: float) -> nn.Module:
    """The same with torch-pruning alone."""
    network = copy.deepcopy(network).eval()
    head = next(module for module in network.modules() if isinstance(module, nn.Linear))
    options = {"pruning_ratio": ratio, "global_pruning": True, "ignored_layers": [head], "max_pruning_ratio": 0.9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = library.pruner.BasePruner(network, x, importance=library.importance.GroupMagnitudeImportance(p=2), **options)
        made.step()
    return network


def trace(network: nn.Module, x: Tensor) -> None:
    """A forward and backward pass."""
    network.eval()(x).sum().backward()
    network.zero_grad()


def check(library: Any, network: nn.Module, x: Tensor) -> None:
    """One group without every second unit."""
    groups = pruning.find_groups(network, x, ("channels",))
    group = next(iter(groups))
    units = list(range(0, group.units, 2))
    mine = pruning.removed(network, groups, {group.name: units}).eval()
    other = copy.deepcopy(network).eval()
    graph = library.DependencyGraph().build_dependency(other, example_inputs=x)
    root = other.get_submodule(group.name)
    graph.get_pruning_group(root, library.prune_conv_out_channels, idxs=units).prune()
    torch.testing.assert_close(mine(x), other(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in other.parameters())


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    network = resnets(8 if given.quick else 32, 8, 1 if given.quick else 4)[0].eval()
    x, peer = torch.randn(2, 3, 32, 32), version("torch-pruning")
    title = f"seconds to prune resnet32x4, limbeck over {peer}"
    found: dict[str, Any] = {}
    try:
        library = need("torch_pruning")
        check(library, network, x)
    except Absent as why:
        say("pruning", given.quick, [absent(title, str(why))])
        return
    arms = {
        "limbeck": lambda: lambda: ours(network, x, RATIO),
        "torch_pruning": lambda: lambda: theirs(library, network, x, RATIO),
        "groups": lambda: lambda: pruning.find_groups(network, x, ("channels",)),
        "trace": lambda: lambda: trace(network, x[:1]),
    }
    times = in_turn(arms, 1 if given.quick else 7, warm=True)
    gain = over(times, "limbeck", "torch_pruning")
    found = {name: milliseconds(values) for name, values in times.items()}
    left = {
        name: sum(p.numel() for p in net.parameters())
        for name, net in (("limbeck", ours(network, x, RATIO)), ("peer", theirs(library, network, x, RATIO)))
    }
    found["weights"] = left | {"before": sum(p.numel() for p in network.parameters())}
    text = f"one forward and backward pass: {found['trace']['ms']:.0f} ms"
    spent = {name: f"{found[name]['ms']:.0f}" for name in arms}
    note = f"{spent['limbeck']} against {spent['torch_pruning']} ms, of it {spent['groups']} for groups and their proofs"
    rows = [row(title, gain["ratio"], None, floor=text, iqr=gain["iqr"], note=note)]
    say("pruning", given.quick, rows, over=gain, **found)


if __name__ == "__main__":
    main()
