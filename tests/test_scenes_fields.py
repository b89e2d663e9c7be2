"""Radiance fields of four architectures, and the losses that turn one into another: against formulas written here."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from limbeck import recipe as schema
from limbeck import zoo
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.method import make
from limbeck.rendering import open_views
from limbeck.scenes.fields import EMPTY, FieldProblem, inside_of, occupancy
from limbeck.scenes.methods.pvd import distance
from limbeck.scenes.methods.pvd_al import turned
from limbeck.zoo.fields import FIELDS
from limbeck.zoo.fields.harmonics import spherical_harmonics

SMALL = {
    "field-mlp": {"width": 8, "depth": 2, "frequencies": 3, "head": 8},
    "field-hash": {"levels": 3, "table": 256, "coarsest": 3, "finest": 12, "width": 8, "head": 8},
    "field-vm": {"resolution": 6, "density_rank": 2, "colour_rank": 3, "head": 8},
    "field-voxels": {"resolution": 6, "bands": 2},
}


def field(name, seed=0, **args):
    torch.manual_seed(seed)
    return zoo.build(name, **{**SMALL[name], **args})


def some(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 3, generator=rng) - 1, F.normalize(torch.randn(count, 3, generator=rng), dim=-1)


# ---- the fields ----


def test_harmonics_are_orthonormal():
    """Quadrature over the sphere: Gauss-Legendre in height, even in turn (exact for these degrees); and each band has its size."""
    import numpy

    heights, weights = numpy.polynomial.legendre.leggauss(8)
    turns = torch.arange(16) * math.pi / 8
    z = torch.tensor(heights)[:, None].expand(8, 16)
    flat = (1 - z**2).sqrt()
    points = torch.stack([flat * turns.cos(), flat * turns.sin(), z], -1).reshape(-1, 3)
    area = (torch.tensor(weights)[:, None] * (math.pi / 8)).expand(8, 16).reshape(-1)
    values = spherical_harmonics(points, 4)
    assert torch.allclose((values * area[:, None]).T @ values, torch.eye(16, dtype=torch.float64), atol=1e-6)
    for band in range(4):  # the sum of squares of a band is (2 l + 1) / 4 pi everywhere
        own = values[:, band**2 : (band + 1) ** 2].square().sum(-1)
        assert torch.allclose(own, torch.full_like(own, (2 * band + 1) / (4 * math.pi)))
    assert torch.equal(spherical_harmonics(points, 2), values[:, :4])
    with pytest.raises(UserError, match="bands"):
        spherical_harmonics(points, 5)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_keeps_its_promises(name):
    """Shapes, ranges, both blocks in agreement, gradients everywhere, arguments and weights on disk."""
    net = field(name)
    x, d = some(50)
    found = net(x, d)
    assert found.log_density.shape == (50,) and found.colour.shape == (50, 3)
    assert (found.feature is None) == (not net.has_feature) and (found.feature is None or found.feature.shape == (50, 15))
    assert bool(((found.colour > 0) & (found.colour < 1)).all() and (found.log_density.abs() <= 7).all())
    alone = net.geometry(x)
    assert torch.equal(alone.log_density, found.log_density) and alone.colour is None
    (found.log_density.sum() + found.colour.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert set(map(id, net.tables())) <= set(map(id, net.parameters()))
    if name != "field-voxels":  # whose harmonics begin at 0
        assert not torch.allclose(net(x, d).colour, net(x, -d).colour, atol=1e-4), "colour depends on the direction"


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_by_finite_differences(name):
    net = field(name).double()
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, d = (t.double() for t in some(6, 2))

    def value():
        found = net(x, d)
        return (found.log_density * torch.arange(1.0, 7)).sum() + (found.colour * torch.tensor([1.0, -2.0, 0.5])).sum()

    value().backward()
    for parameter in net.parameters():
        for at in parameter.grad.flatten().abs().topk(min(3, parameter.numel())).indices.tolist():
            flat, ends = parameter.data.view(-1), []
            kept = float(flat[at])
            for step in (1e-6, -1e-6):
                flat[at] = kept + step
                ends.append(float(value().detach()))
            flat[at] = kept
            assert float(parameter.grad.flatten()[at]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_a_saved_field_opens_again(name, tmp_path):
    net = field(name, bound=1.5)
    zoo.save_model(net, tmp_path)
    opened = zoo.load_model(tmp_path)
    x, d = some(20)
    assert type(opened) is type(net) and opened.bound == 1.5
    assert torch.equal(opened(x, d).colour, net(x, d).colour) and torch.equal(opened(x, d).log_density, net(x, d).log_density)


def test_a_hash_grid_without_collisions_is_a_dense_grid():
    """Where all corners fit, the encoding is trilinear interpolation by grid_sample; and its entries are those of the corners."""
    net = field("field-hash", levels=2, coarsest=3, finest=5, table=256, features=2)
    encoding = net.encoding
    assert bool(encoding.dense.all())
    torch.nn.init.normal_(encoding.values)
    x, _ = some(40)
    x[0], x[1] = 1.0, torch.tensor([1.0, -1.0, 1.0])  # corners of the cube belong to its last cells
    found = encoding((x + 1) / 2)
    for level, cells in enumerate((3, 5)):
        side = cells + 1
        table = encoding.values.data[level * 256 : level * 256 + side**3].view(side, side, side, 2).permute(3, 0, 1, 2)[None]  # z, y, x
        truth = F.grid_sample(table, x[None, :, None, None], align_corners=True)[0, :, :, 0, 0].T
        assert torch.allclose(found[:, 2 * level : 2 * level + 2], truth, atol=1e-5)


def test_hashed_entries_follow_the_formula():
    net = field("field-hash", levels=2, coarsest=4, finest=40, table=64)
    encoding = net.encoding
    assert encoding.dense.tolist() == [False, False]
    low = torch.randint(0, 39, (3, 2, 30), dtype=torch.int32)
    found = encoding.places(low)
    for corner in range(8):
        a, b, c = corner >> 2, corner >> 1 & 1, corner & 1
        for level in range(2):
            for point in range(30):
                x, y, z = (int(low[axis, level, point]) + shift for axis, shift in enumerate((a, b, c)))
                entry = ((x * 1) ^ (y * 2654435761) ^ (z * 805459861)) % 64
                assert int(found[corner, level, point]) == entry + 64 * level


def test_vm_is_a_sum_of_outer_products():
    net = field("field-vm", start=0.0)
    with torch.no_grad():
        for p in net.tables():
            p.normal_(std=0.5)
    line = torch.linspace(-1, 1, 6)
    x = torch.cartesian_prod(line, line, line)  # the grid points, where interpolation is exact
    planes, lines = net.density_planes, net.density_lines[..., 0]
    tensor = torch.einsum("ryx,rz->xyz", planes[0], lines[0])  # a picture's rows run along the second axis of its plane
    tensor = tensor + torch.einsum("rzx,ry->xyz", planes[1], lines[1]) + torch.einsum("rzy,rx->xyz", planes[2], lines[2])
    assert torch.allclose(net.raw_geometry(x)[0], tensor.reshape(-1), atol=1e-4)
    sizes = [float(values.detach().abs().mean()) for values in (net.density_planes, net.density_lines)]
    assert float(net.penalty().detach()) == pytest.approx(sum(sizes))


def test_voxels_are_interpolated_coefficients():
    net = field("field-voxels", bands=1)
    with torch.no_grad():
        net.density.normal_()
        net.harmonics.normal_()
    x, d = torch.tensor([[1.0, -1.0, 0.2], [-1.0, 1.0, 1.0]]), some(2)[1]
    found = net(x, d)
    assert float(found.log_density[1].detach()) == pytest.approx(
        float(net.density.detach()[0, 0, 5, 5, 0]), abs=1e-5
    )  # grid is stored z, y, x
    constant = 0.5 / math.sqrt(math.pi)
    assert torch.allclose(found.colour[1], torch.sigmoid(constant * net.harmonics[0, :, 5, 5, 0]), atol=1e-5)
    share = (0.2 + 1) / 2 * 5
    low = int(share)
    between = torch.lerp(net.density[0, 0, low, 0, 5], net.density[0, 0, low + 1, 0, 5], share - low)
    assert float(found.log_density[0].detach()) == pytest.approx(float(between.detach()), abs=1e-5)


def test_positional_encoding_of_the_mlp():
    net = field("field-mlp", frequencies=2, bound=2.0)
    seen = {}
    net.trunk.register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    net.geometry(torch.tensor([[1.0, -0.5, 0.0]]))
    u = [0.5, -0.25, 0.0]
    waves = [math.pi * 2**k * v for v in u for k in range(2)]
    assert torch.allclose(seen["x"][0], torch.tensor([*u, *map(math.sin, waves), *map(math.cos, waves)]), atol=1e-6)


def test_bad_arguments_of_fields():
    for name, args, words in (
        ("field-hash", {"table": 100}, "power of two"),
        ("field-hash", {"coarsest": 9, "finest": 3}, "finest"),
        ("field-mlp", {"width": 0}, "width is 0"),
        ("field-mlp", {"widht": 3}, "widht"),
        ("field-voxels", {"bands": 7}, "bands"),
        ("field-vm", {"bound": 0}, "bound"),
    ):
        with pytest.raises(UserError) as caught:
            zoo.build(name, **args)
        assert words in caught.value.message + caught.value.hint


# ---- the losses ----


@pytest.fixture(scope="module")
def views():
    return open_views("scene:globes", train=4, test=2, size=10)


def problem(views, teacher="field-hash", student="field-mlp", rays=12, total=30, method=None, **spec):
    nets = [field(name, seed) for seed, name in enumerate((teacher, student))]
    training = schema.Training(steps=total, batch=rays, optimizer="adam", lr=0.01, weight_decay=0)
    made = FieldProblem(
        nets[1],
        nets[0].requires_grad_(False),
        schema.Scene(points=6, **spec),
        training,
        total,
        torch.device("cpu"),
        0,
        Session(),
        views=views,
        held=views.test,
    )
    if method is not None:
        torch.manual_seed(0)
        method.bind(made)
        method.setup(made)
    return made


def clock(step, total=30):
    return Clock(step, total, total)


def test_three_stages_with_their_terms_by_hand(views):
    """Every term of `pvd` recomputed from the two fields at the points of the same rays."""
    method = make("pvd", {"stages": [0.2, 0.5], "cells": 0, "cameras": 2, "s_clip": [-0.1, 0.05], "there_above": 0.0})
    made = problem(views, method=method)
    names = {0: ["feature"], 7: ["feature", "color", "sigma"], 20: ["pixels", "feature", "color", "sigma"]}
    for step, expected in names.items():
        torch.manual_seed(step)
        terms = method.losses("student", clock(step))
        assert list(terms) == expected and method.stage(clock(step)) == {0: 1, 7: 2, 20: 3}[step]
        torch.manual_seed(step)
        shot = method.rays(clock(step))
        a, b = made.student(shot.places, shot.views), made.teacher(shot.places, shot.views)
        s = (a.log_density.clamp(-0.1, 0.05) - b.log_density.clamp(-0.1, 0.05)).square().sum()
        f = s + (a.feature - b.feature).square().sum()
        assert float(terms["feature"]) == pytest.approx(0.002 * 0.995**step * math.sqrt(f), rel=1e-4)
        if step >= 7:
            assert float(terms["sigma"]) == pytest.approx(0.002 * math.sqrt(s), rel=1e-4)
            assert float(terms["color"]) == pytest.approx(0.002 * float((a.colour - b.colour).square().sum().sqrt()), rel=1e-4)
        if step == 20:
            gap = shot.composed(a).colour - shot.composed(b).colour
            assert float(terms["pixels"]) == pytest.approx(math.sqrt(gap.square().sum()), rel=1e-4)


def test_kinds_of_distance():
    x = torch.tensor([[3.0, -4.0], [0.02, 0.0]])
    assert float(distance(x)) == pytest.approx(math.sqrt(25.0004))
    assert float(distance(x, "l1")) == pytest.approx(7.02) and float(distance(x, "mse")) == pytest.approx(25.0004 / 4)
    assert float(distance(x, "smooth-l1")) == pytest.approx((2.975 + 3.975 + 0.5 * 0.0004 / 0.05) / 4, rel=1e-4)
    twice = torch.cat([x, x])
    assert float(distance(twice)) == pytest.approx(math.sqrt(2) * float(distance(x))), "the norm is over the batch, not its mean"


def test_voxels_have_no_first_stage(views):
    method = make("pvd", {"stages": [0.5, 0.5], "cells": 0})
    problem(views, student="field-voxels", method=method)
    assert method.stage(clock(0)) == 2 and "feature" not in method.losses("student", clock(0))
    method = make("pvd", {"cells": 0, "stages": [0, 0]})
    problem(views, student="field-vm", method=method)
    assert "sparse" in method.losses("student", clock(0))


def test_occupancy_finds_the_ball():
    class Ball(torch.nn.Linear):
        def geometry(self, x):
            from limbeck.zoo.fields import FieldOutput

            return FieldOutput(torch.where((x - torch.tensor([0.4, 0.0, -0.2])).norm(dim=-1) < 0.3, 3.0, -7.0), None)

    grid = occupancy(Ball(1, 1), 1.0, 16, above=-2.0)
    x, _ = some(4000)
    far = (x - torch.tensor([0.4, 0.0, -0.2])).norm(dim=-1)
    there = inside_of(grid, x, 1.0)
    assert bool(there[far < 0.3].all()), "no point of the ball is lost"
    assert not bool(there[far > 0.3 + 2 * math.sqrt(3) * 2 / 16].any()), "at most the neighbouring cells are added"
    assert 0.01 < float(there.float().mean()) < 0.15


def test_empty_space_is_left_out_and_still_taught(views):
    """Only points in occupied cells reach the fields; rays are composed as if the others were empty; some of them are told so."""
    method = make("pvd", {"stages": [0, 0], "cells": 8, "cameras": 2, "empty_share": 1.0})
    made = problem(views, method=method)
    method._occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    method._occupied[4:, :, :] = True
    torch.manual_seed(0)
    shot, empty = method.thinned(method.rays(clock(0)))
    assert bool((shot.places[:, 0] >= 0).all() and (empty[:, 0] < 0).all())
    assert len(shot.places) + len(empty) == shot.depths.numel()
    found = made.student(shot.places, shot.views)
    full = torch.full((shot.depths.numel(),), EMPTY).index_put((shot.kept,), found.log_density)
    passed = torch.exp(-(full.view_as(shot.depths).exp() * shot.lengths).sum(-1))
    assert torch.allclose(1 - shot.composed(found).opacity, passed, atol=1e-5)
    own = made.student.geometry(empty).log_density
    gap = method.gap(found, made.teacher(shot.places, shot.views), None, own)
    assert torch.allclose(gap[len(shot.places) :], own.clamp(-5, 7) + 5)


def test_copied_heads_stay(views):
    method = make("pvd", {"copy_head": True, "cells": 0})
    made = problem(views, method=method)
    same = zip(made.teacher.colour_head.parameters(), made.student.colour_head.parameters())
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in same)
    trained = {id(p) for group in method.groups(made) for p in group["params"]}
    assert not trained & {id(p) for p in made.student.colour_head.parameters()} and trained
    with pytest.raises(UserError, match="copy_head"):
        problem(views, student="field-voxels", method=make("pvd", {"copy_head": True}))


def test_new_poses_stand_among_the_training_cameras(views):
    made = problem(views)
    torch.manual_seed(0)
    poses = made.new_poses(200)
    places, own = poses[:, :, 3], views.train.cameras.places
    assert torch.allclose(places.norm(dim=-1), torch.full((200,), 3.0), atol=1e-4)
    height = places[:, 2] / 3
    assert float(height.min()) >= float(own[:, 2].min()) / 3 - 1e-5 and float(height.max()) <= float(own[:, 2].max()) / 3 + 1e-5
    assert torch.allclose(torch.linalg.cross(poses[:, :, 0], poses[:, :, 1]), poses[:, :, 2], atol=1e-5)
    made.views = copy.copy(views)
    made.views.around = False
    inside = made.new_poses(100)[:, :, 3]
    assert bool(((inside >= own.amin(0)) & (inside <= own.amax(0))).all())


# ---- active learning ----


def test_turned_poses_are_products_of_rotations():
    poses = torch.cat([torch.eye(3)[None], torch.tensor([[[1.0], [2.0], [3.0]]])], -1)
    a, b, c = 0.1, -0.2, 0.3
    rx = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    ry = torch.tensor([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    rz = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    found = turned(poses, torch.tensor([[a, b, c]]))
    assert torch.allclose(found[0, :, :3], rz @ ry @ rx, atol=1e-6) and torch.equal(found[0, :, 3], poses[0, :, 3])


def active(views, **settings):
    usual = {"cameras": 2, "epoch": 4, "image_pool": 2, "ray_pool": 6, "stages": [0, 0], "start_epoch": 0}
    usual |= {"hard_images": 0.5, "hard_rays": 0.25}
    method = make("pvd-al", {**usual, **settings})
    return method, problem(views, method=method)


def test_hard_cameras_are_kept_turned_and_shown_again(views):
    method, made = active(views, levels=["image"])
    first = []
    for step in range(2):  # the first epoch
        method.losses("student", clock(step))
        first.append(method.state["poses"].clone())
    assert torch.equal(first[0], first[1]) and len(method.state["image_pool"]) == 0
    errors = method.state["errors"].clone()
    assert bool((errors > 0).all())
    method.losses("student", clock(2))
    worst = first[0][errors.argsort(descending=True)[:2]]
    assert torch.equal(method.state["image_pool"], worst) and method.state["replayed"] == 0
    for step in range(3, 5):
        method.losses("student", clock(step))
    assert method.state["replayed"] == 2
    near = torch.cdist(method.state["poses"][:, :, 3], worst[:, :, 3]).min(-1)
    again = near.values < 1e-6
    assert int(again.sum()) == 2, "half of the epoch stands where the hard ones stood"
    for pose, which in zip(method.state["poses"][again], near.indices[again]):
        turn = pose[:, :3] @ worst[which][:, :3].T
        angle = math.acos(min(1.0, (float(turn.trace()) - 1) / 2))
        assert 0 < angle < 3 * math.pi / 20
    assert made.training.batch == 12


def test_hard_rays_come_again_with_other_backgrounds(views):
    method, made = active(views, levels=["ray"])
    torch.manual_seed(0)
    method.losses("student", clock(0))
    assert method.state["ray_pool"].shape == (3, 6), "a quarter of twelve rays"
    torch.manual_seed(1)
    shot = method.rays(clock(1))
    assert len(shot.depths) == 12, "the pool is not full yet"
    method.losses("student", clock(1))
    assert len(method.state["ray_pool"]) == 6
    before = method.state["ray_pool"].clone()
    shot = method.rays(clock(2))
    assert len(shot.depths) == 15 and shot.kept is None
    slots = method.state["taken"]
    assert torch.equal(torch.cat([shot.origins[12:], shot.directions[12:]], -1), before[slots])
    a, b = made.student(shot.places, shot.views), made.teacher(shot.places, shot.views)
    errors = (shot.composed(a).colour - shot.composed(b).colour).abs().sum(-1)[:12]
    method.deeper(shot, shot.composed(a), shot.composed(b))
    hardest = errors.topk(3).indices
    assert torch.allclose(method.state["ray_pool"][slots], torch.cat([shot.origins, shot.directions], -1)[hardest])
    rest = [slot for slot in range(6) if slot not in slots.tolist()]
    assert torch.equal(method.state["ray_pool"][rest], before[rest])


def test_points_that_matter_in_either_field(views):
    method, made = active(views, levels=["point"], cells=0, weight_above=0.02)
    torch.manual_seed(0)
    shot = method.rays(clock(0))
    a, b = made.student(shot.places, shot.views), made.teacher(shot.places, shot.views)
    seen, truth = shot.composed(a), shot.composed(b)
    seen.weights = torch.zeros_like(seen.weights)
    seen.weights[0, 1] = 0.5
    truth.weights = torch.zeros_like(truth.weights)
    truth.weights[1, 2] = 0.5
    pick, dense = method.points(shot, b, truth, seen)
    assert pick.tolist() == [1, 6 + 2] and dense is pick
    assert {"depth", "pixels"} <= set(method.losses("student", clock(0)))
    none, _ = active(views, levels=[])
    assert none.points(shot, b, truth, seen)[1] is None
    with pytest.raises(UserError, match="rays"):
        active(views, levels=["rays"])


def test_depth_is_compared(views):
    method, made = active(views, levels=[], k_depth=0.5)
    torch.manual_seed(3)
    terms = method.losses("student", clock(0))
    torch.manual_seed(3)
    # the cameras of the epoch are drawn already: the same two follow
    assert float(terms["depth"]) > 0
    shot = made.shot(*made.rays_from(made.new_poses(2), 12))
    a, b = (shot.composed(net(shot.places, shot.views)) for net in (made.student, made.teacher))
    assert float(method.deeper(shot, a, b)["depth"]) == pytest.approx(0.5 * float((a.depth - b.depth).square().sum().sqrt()), rel=1e-5)


def test_values_at_places_learn_at_their_own_rate(views):
    for name, factor in (("field-voxels", 10), ("field-vm", 2), ("field-hash", 1), ("field-mlp", 1)):
        method = make("from-images", {})
        made = problem(views, student=name, method=method)
        optimizer = method.optimizers(made)["student"]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(list(made.student.parameters()))
        tables = {id(p) for p in made.student.tables()}
        assert all(rate == pytest.approx(0.01 * (factor if p in tables else 1)) for p, rate in rates.items())
        assert all(group["eps"] == 1e-15 for group in optimizer.param_groups)


def test_rivals_begin_where_the_student_began(views):
    from limbeck.scenes import fields_job

    made = problem(views, total=1, curve=0)
    made.start = copy.deepcopy(made.student)
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.3
    made.training.lr = 1e-12
    row = fields_job._rival(make("from-images", {}), "baseline", made, 0.0, Session())
    assert row.figures["psnr"] == pytest.approx(made.quality(made.start)["psnr"], abs=1e-4)
    assert row.figures["psnr"] != pytest.approx(made.quality(made.student)["psnr"], abs=1e-2)
    assert row.steps == 1 and row.seconds is not None
