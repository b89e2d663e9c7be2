"""Budgets, fronts, search, training-free scores, and runs of blocks: against formulas written here."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import zoo
from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget, figure_of
from limbeck.evaluation.front import front
from limbeck.structure import intervals, proxies
from limbeck.structure.feedforward import straightened
from limbeck.structure.search import search, size_of

COST = {"params": 100, "flops": 2000, "bytes": 400, "latency_ms": 2.0, "peak_memory": 5000}


class TestBudget:
    def test_shares_are_of_the_reference_and_numbers_stand_as_they_are(self):
        budget = Budget.of({"params": "40%", "flops": 300, "memory": "10 %", "bits": 4}, COST)
        assert budget.limits == {"params": 40.0, "flops": 300.0, "memory": 500.0, "bits": 4.0}

    def test_excess_and_tightest(self):
        budget = Budget.of({"params": 50, "bytes": 1600}, COST)
        assert budget.excess(COST) == {"params": 2.0, "bytes": 0.25}
        assert budget.tightest(COST) == ("params", 2.0)
        assert not budget.met(COST) and budget.met({**COST, "params": 50})

    def test_bits_are_those_of_the_stored_bytes(self):
        assert figure_of(COST, "bits") == 8 * 400 / 100

    @pytest.mark.parametrize("value", ["-3", 0, "many", "0%", float("inf"), float("nan")])
    def test_a_limit_must_be_a_positive_number(self, value):
        with pytest.raises(UserError, match=r"budget\.params is"):
            Budget.of({"params": value}, COST)

    def test_what_cannot_be_met_names_the_smallest(self):
        error = Budget.of({"params": 10, "flops": 9000}, COST).refuse(COST, "pruning")
        assert "100 parameters (asked: 10)" in error.message and "FLOPs" not in error.message

    def test_nothing_limited(self):
        with pytest.raises(UserError, match="limits nothing"):
            Budget({}).tightest(COST)


class TestFront:
    def test_against_every_pair(self):
        rng = torch.Generator().manual_seed(0)
        points = [tuple(row) for row in torch.randint(0, 5, (40, 3), generator=rng).tolist()]
        larger = (True, False, True)

        def beats(a, b):
            signed = [(x - y) if up else (y - x) for x, y, up in zip(a, b, larger)]
            return all(d >= 0 for d in signed) and any(d > 0 for d in signed)

        expected = [i for i, b in enumerate(points) if not any(beats(a, b) for a in points)]
        assert front(points, larger) == expected and 0 < len(expected) < 40


class TestSearch:
    SPACE = {"a": list(range(12)), "b": list(range(12)), "c": [[1, 2], [3]]}

    @staticmethod
    def look(genes):
        if genes["a"] == 3:
            return None
        score = float(-((genes["a"] - 7) ** 2) - (genes["b"] - 2) ** 2 + len(genes["c"]))
        return score, {**COST, "params": 10 * genes["a"] + genes["b"] + 1}

    def test_a_small_space_is_looked_at_whole(self):
        space = {"a": [1, 7], "b": [0, 2], "c": [[1]]}
        found = search(space, self.look, None, trials=10)
        assert found.seen == size_of(space) == 4 and found.best.genes == {"a": 7, "b": 2, "c": [1]}

    def test_evolution_finds_the_best_within_the_budget_of_a_larger_space(self):
        pytest.importorskip("optuna")
        budget = Budget({"params": 66.0})
        found = search(self.SPACE, self.look, budget, trials=150, population=15, seed=0)
        keeps = [
            self.look(genes)[0]
            for values in itertools.product(*self.SPACE.values())
            if self.look(genes := dict(zip(self.SPACE, values))) and self.look(genes)[1]["params"] <= 66
        ]
        assert found.seen <= 150 < size_of(self.SPACE)
        assert found.best.cost["params"] <= 66 and found.best.score >= sorted(keeps)[-5]
        assert [one.cost["params"] for one in found.front] == sorted(one.cost["params"] for one in found.front)
        assert all(one.within for one in found.front) and found.front[-1].score == found.best.score
        again = search(self.SPACE, self.look, budget, trials=150, population=15, seed=0)
        assert again.best.genes == found.best.genes

    def test_a_budget_below_everything_names_the_nearest(self):
        with pytest.raises(UserError, match=r"smallest reachable model has 11 parameters \(asked: 5\)"):
            search({"a": [1, 2], "b": [0], "c": [[1]]}, self.look, Budget({"params": 5.0}))

    def test_nothing_can_be_built(self):
        with pytest.raises(UserError, match="can be built"):
            search({"a": [3], "b": [0], "c": [[1]]}, self.look, None)

    @pytest.mark.parametrize("space", [{}, {"a": []}, {"a": 3}])
    def test_a_space_names_values(self, space):
        with pytest.raises(UserError):
            search(space, self.look, None)


class TestProxies:
    def test_semantic_distance_by_hand(self):
        """Rows of g g^T of length 1 are sign(g_i) g / |g|."""
        s, t = torch.randn(3, 5), torch.randn(3, 5)
        t[1, 2] = 0.0
        expected = 0.0
        for k in range(3):
            for i in range(5):
                row_s = torch.sign(s[k, i]) * s[k] / s[k].norm()
                row_t = torch.sign(t[k, i]) * t[k] / t[k].norm()
                expected += float((row_s - row_t).square().sum())
        assert float(proxies.semantic_distance(s, t)) == pytest.approx(expected / 15, rel=1e-5)
        assert float(proxies.semantic_distance(s, s)) == 0
        with pytest.raises(UserError, match="one width before the classifier"):
            proxies.semantic_distance(s, torch.randn(3, 4))

    def test_gradient_and_features_are_those_of_the_network(self):
        torch.manual_seed(0)
        network = zoo.build("convnet", input_shape=(1, 8, 8), classes=4, width=4, depth=2, out=6, norm="none").eval()
        x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0])
        told = proxies.said(network, x, y)
        maps = network.stages(x)
        pooled = maps.mean((2, 3))
        p = (pooled @ network.head.weight.T + network.head.bias).softmax(1) - F.one_hot(y, 4)
        assert torch.allclose(told.features, maps) and torch.allclose(told.gradient, p.T @ pooled / 5, atol=1e-6)
        assert all(q.grad is None for q in network.parameters())

    def test_gaussian_weights(self):
        network = zoo.build("convnet", input_shape=(1, 8, 8), classes=4, width=64, depth=1, norm="batch")
        made = proxies.gaussian(network)
        assert abs(float(made.head.weight.detach().std()) - 1) < 0.05 and float(made.head.bias.detach().abs().sum()) == 0
        norm = next(m for m in made.modules() if isinstance(m, nn.BatchNorm2d))
        assert bool((norm.weight == 1).all()) and bool((norm.bias == 0).all())
        assert not torch.equal(network.head.weight, made.head.weight)

    def test_code_overlap_counts_agreeing_units(self):
        network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
        x = torch.randn(4, 2)
        code = network[0](x) > 0
        same = (code[:, None] == code[None]).sum(-1).double()
        sign, value = torch.linalg.slogdet(same)
        assert proxies.code_overlap(network, x) == pytest.approx(float(value)) or (float(sign) == 0 and math.isinf(float(value)))

    def test_saliency_of_one_weight(self):
        network = nn.Linear(1, 2, bias=False)
        x, y = torch.ones(1, 1), torch.tensor([1])
        p = network.weight.detach().flatten().softmax(0)
        expected = float((network.weight.detach().flatten() * (p - torch.tensor([0.0, 1.0]))).abs().sum())
        assert proxies.saliency(network, x, y) == pytest.approx(expected, rel=1e-5)
        assert proxies.gradient_norm(network, x, y) == pytest.approx(float((p - torch.tensor([0.0, 1.0])).norm()), rel=1e-5)

    def test_synaptic_flow_of_two_layers(self):
        """Every path's product is counted once for each of its weights."""
        network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
        paths = network[1].weight.detach().abs().double() @ network[0].weight.detach().abs().double()
        assert proxies.synaptic_flow(network, torch.rand(4, 2)) == pytest.approx(math.log(2 * float(paths.sum())))

    def test_a_network_without_linear_head_is_named(self):
        with pytest.raises(UserError):
            proxies.said(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()), torch.rand(2, 1, 3, 3), torch.tensor([0, 1]))


def dit(depth=5, **args):
    torch.manual_seed(0)
    network = zoo.build("dit", input_shape=(1, 8, 8), classes=3, dim=16, depth=depth, heads=2, **args)
    for p in network.parameters():  # gates start at zero, and every block as the identity
        nn.init.normal_(p, std=0.2)
    return network.eval()


def passes(network, count=4):
    rng = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x, level, label = torch.randn(6, 1, 8, 8, generator=rng), torch.randn(6, generator=rng), torch.randint(3, (6,), generator=rng)
        found.append(lambda x=x, level=level, label=label: network(x, level, label))
    return found


class TestIntervals:
    def test_linear_fit_recovers_an_affine_map(self):
        x, a, b = torch.randn(50, 4), torch.randn(3, 4), torch.randn(3)
        found = intervals.linear_fit(x, x @ a.T + b)
        assert torch.allclose(found[0], a, atol=1e-4) and torch.allclose(found[1], b, atol=1e-4)

    def test_a_linear_block_is_not_missed(self):
        network = dit()
        for module in (network.blocks[2].mlp[2], network.blocks[2].attention.project):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        scores = intervals.probe(network, passes(network))
        assert float(scores[2]) == pytest.approx(1, abs=1e-5) and float(scores.max()) == float(scores[2])
        assert scores.shape == (5,) and float(scores.min()) < 0.999

    def test_merging_takes_the_cheapest_and_keeps_the_length(self):
        assert intervals.merged([0.1, 0.9, 0.2, 0.3], 3, 3) == [(0, 1), (2, 4)]
        with pytest.raises(UserError, match="cannot go in runs of at most 2"):
            intervals.merged([0.1, 0.2, 0.3, 0.4], 3, 2)
        with pytest.raises(UserError):
            intervals.merged([0.1, math.inf], 2, 5)

    def test_places(self):
        assert intervals.places(6, [(0, 2), (4, 5)]) == [(0, 2), (3, 3), (4, 5)]

    def test_shortened_is_the_network_without_the_later_blocks(self):
        network, (x, level, label) = dit(), (torch.randn(2, 1, 8, 8), torch.randn(2), torch.tensor([0, 2]))
        made = intervals.shortened(network, [(1, 3)])
        whole = network.blocks
        network.blocks = nn.ModuleList([whole[0], whole[1], whole[4]])
        assert len(made.blocks) == 3 and torch.equal(made(x, level, label), network(x, level, label))
        assert made.limbeck_config["args"]["depth"] == 3

    def test_flow_stops_behind_the_last_block_and_sees_what_goes_in_and_out(self):
        network = dit()
        seen = []
        network.blocks[3].register_forward_hook(lambda *a: seen.append(1))
        flow = intervals.pass_through(network, passes(network)[0], [1], [2])
        assert not seen and set(flow.inputs) == {1} and set(flow.outputs) == {2}
        out = network.blocks[2](network.blocks[1](*flow.inputs[1]), *flow.inputs[1][1:])
        assert torch.allclose(out, flow.outputs[2])

    def test_any_subset_can_be_plugged_in(self):
        """All runs replaced is the student, none is the teacher, one has that run's block only."""
        teacher, runs = dit(6), [(0, 1), (3, 5)]
        student = intervals.shortened(teacher, runs)
        for block in student.blocks:
            for p in block.parameters():
                nn.init.normal_(p, std=0.1)
        data = (torch.randn(2, 1, 8, 8), torch.randn(2), torch.tensor([0, 2]))
        # kept blocks of the whole student are the teacher's own, as when only segments were trained
        student.blocks[1].load_state_dict(teacher.blocks[2].state_dict())
        assert torch.equal(intervals.plugged(teacher, student, runs, [])(*data), teacher(*data))
        assert torch.equal(intervals.plugged(teacher, student, runs, [0, 1])(*data), student(*data))
        one = intervals.plugged(teacher, student, runs, [1])
        assert len(one.blocks) == 4
        assert torch.equal(one.blocks[3].attention.qkv.weight, student.blocks[2].attention.qkv.weight)
        assert torch.equal(one.blocks[0].attention.qkv.weight, teacher.blocks[0].attention.qkv.weight)

    @pytest.mark.parametrize("network", [nn.Linear(2, 2), zoo.build("dit", input_shape=(1, 8, 8), classes=0, dim=16, depth=1, heads=2)])
    def test_what_has_no_blocks_is_named(self, network):
        with pytest.raises(UserError, match="has no list of blocks"):
            intervals.blocks_of(network)


class TestFeedForward:
    def test_a_linear_part_is_replaced_without_a_change(self):
        """GELU of large positive numbers is the identity: the part of block 1 is then an affine map, and is found and copied."""
        network = dit(3)
        nn.init.constant_(network.blocks[1].mlp[0].bias, 60.0)
        made, numbers = straightened(network, passes(network, 12), 0.34, None, None, lambda what, make: make())
        assert numbers == [1] and made.limbeck_config["args"]["linear"] == [1]
        assert isinstance(made.blocks[1].mlp, nn.Linear) and sum(p.numel() for p in made.parameters()) < sum(
            p.numel() for p in network.parameters()
        )
        x = (torch.randn(3, 1, 8, 8), torch.randn(3), torch.tensor([0, 1, 2]))
        assert torch.allclose(made(*x), network(*x), atol=2e-3 * float(network(*x).abs().max()))

    def test_what_cannot_become_linear_is_named(self):
        with pytest.raises(UserError, match="cannot become linear maps"):
            straightened(zoo.build("vit", input_shape=(1, 8, 8), classes=3), [], 0.5, None, None, None)
