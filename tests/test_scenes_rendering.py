"""Cameras, rays, compositing, exact pictures, metrics: against formulas written here."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from limbeck.errors import UserError
from limbeck.evaluation.pictures import picture_quality, psnr
from limbeck.rendering import (
    Cameras,
    clamp_inward,
    composite,
    cube_bounds,
    depths_along,
    look_at,
    open_views,
    orbit,
    render,
    render_views,
    truncated_exp,
)
from limbeck.rendering.scenes import pictures_of
from limbeck.rendering.shapes import Box, Letter, Sphere, letter_outlines, trace

WHITE = torch.ones(3)


def directions(count, seed=0):
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Said:
    """What a made-up field says."""

    def __init__(self, log_density, colour):
        self.log_density, self.colour = log_density, colour


# ---- compositing ----


def test_weights_and_what_passes_sum_to_one():
    torch.manual_seed(0)
    s, colour = torch.randn(7, 12) * 2, torch.rand(7, 12, 3)
    depths, lengths = depths_along(torch.rand(7) + 1, torch.rand(7) + 3, 12, jitter=True)
    found = composite(s, colour, depths, lengths)
    passed = torch.exp(-(s.exp() * lengths).sum(-1))
    assert torch.allclose(found.weights.sum(-1) + passed, torch.ones(7), atol=1e-6)
    assert torch.allclose(found.opacity, 1 - passed, atol=1e-6)
    white = composite(s, colour, depths, lengths, WHITE).colour
    assert torch.allclose(white - found.colour, passed[:, None].expand(7, 3), atol=1e-6)


def test_compositing_against_a_loop():
    torch.manual_seed(1)
    s, colour, background = torch.randn(3, 5), torch.rand(3, 5, 3), torch.rand(3, 3)
    depths, lengths = torch.rand(3, 5).sort(-1).values, torch.rand(3, 5)
    found = composite(s, colour, depths, lengths, background)
    for ray in range(3):
        passed, seen, deep = 1.0, torch.zeros(3), 0.0
        for point in range(5):
            alpha = 1 - math.exp(-math.exp(s[ray, point]) * float(lengths[ray, point]))
            seen, deep = seen + passed * alpha * colour[ray, point], deep + passed * alpha * float(depths[ray, point])
            passed *= 1 - alpha
        assert torch.allclose(found.colour[ray], seen + passed * background[ray], atol=1e-5)
        assert float(found.depth[ray]) == pytest.approx(deep, abs=1e-5)


def test_a_constant_fog_has_a_closed_form():
    """C = c (1 - exp(-sigma l)) + b exp(-sigma l), whatever the points are."""
    sigma, colour = 0.7, torch.tensor([0.2, 0.5, 0.9])

    def fog(x, d):
        return Said(torch.full((len(x),), math.log(sigma)), colour.expand(len(x), 3))

    origins, way = torch.tensor([[-3.0, 0.1, 0.2], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = render(fog, origins, way, bound=1.0, points=9, background=WHITE, jitter=True)
    length = torch.tensor([2.0, 1.0 - 0.05])  # the second one begins inside, at the nearest distance
    passed = torch.exp(-sigma * length)[:, None]
    assert torch.allclose(found.colour, colour * (1 - passed) + passed, atol=1e-5)
    miss = render(fog, torch.tensor([[-3.0, 5.0, 0.0]]), way[:1], 1.0, 9, WHITE)
    assert torch.equal(miss.colour, WHITE[None]) and float(miss.opacity) == 0


def test_points_lie_inside_their_intervals():
    torch.manual_seed(2)
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    depths, lengths = depths_along(near, far, 8, jitter=True)
    edges = near[:, None] + (far - near)[:, None] / 8 * torch.arange(9)
    assert bool((depths >= edges[:, :-1]).all() and (depths <= edges[:, 1:]).all())
    assert torch.allclose(lengths.sum(-1), far - near)
    middle, _ = depths_along(near, far, 8, jitter=False)
    assert torch.allclose(middle[0], (edges[0, 1:] + edges[0, :-1]) / 2)


def test_cube_bounds_lie_on_the_cube():
    origins, way = 3 * directions(200, 3), -directions(200, 3) + 0.5 * directions(200, 4)
    near, far = cube_bounds(origins, F.normalize(way, dim=-1), 0.7)
    hit = far > near
    assert 20 < int(hit.sum()) < 200
    for t in (near, far):
        place = origins + t[:, None] * F.normalize(way, dim=-1)
        assert torch.allclose(place.abs().amax(-1)[hit], torch.full((int(hit.sum()),), 0.7), atol=1e-5)


# ---- density ----


def test_gradient_of_the_truncated_exponential():
    x = torch.tensor([-20.0, -3.0, 0.0, 5.0, 14.0], dtype=torch.float64, requires_grad=True)
    value = truncated_exp(x)
    assert torch.equal(value, x.exp())
    value.sum().backward()
    assert torch.allclose(x.grad, torch.tensor([-12.0, -3.0, 0.0, 5.0, 12.0], dtype=torch.float64).exp())
    inner = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(truncated_exp, (inner,))


def test_a_clamp_lets_only_the_way_back_through():
    x = torch.tensor([-9.0, -9.0, 1.0, 1.0, 9.0, 9.0], requires_grad=True)
    pull = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    value = clamp_inward(x, -7, 7)
    assert torch.equal(value, x.clamp(-7, 7))
    (value * pull).sum().backward()
    assert x.grad.tolist() == [0, -1, 1, -1, 1, 0]


# ---- cameras ----


def test_a_projected_point_falls_on_its_ray():
    torch.manual_seed(3)
    cameras = orbit(5, 40, radius=(2.0, 4.0))
    camera, points = torch.arange(5).repeat(20), 0.6 * (2 * torch.rand(100, 3) - 1)
    u, v, ahead = cameras.project(camera, points)
    assert bool((ahead > 0).all())
    origins, way = cameras.rays(camera, u, v)
    distance = (points - origins).norm(dim=-1)
    assert torch.allclose(origins + distance[:, None] * way, points, atol=1e-4)
    inside = (u > 0) & (u < 40) & (v > 0) & (v < 40)
    assert float(inside.float().mean()) > 0.8


def test_poses_are_rotations_that_look_at_the_middle():
    cameras = orbit(30, 16, elevation=(-80, 90), generator=torch.Generator().manual_seed(0))
    turn = cameras.poses[:, :, :3]
    assert torch.allclose(turn.transpose(1, 2) @ turn, torch.eye(3).expand(30, 3, 3), atol=1e-5)
    assert torch.allclose(torch.det(turn), torch.ones(30), atol=1e-5)
    u, v, ahead = cameras.project(torch.arange(30), torch.zeros(30, 3))
    assert torch.allclose(torch.stack([u, v, ahead]), torch.tensor([8.0, 8.0, 3.0])[:, None].expand(3, 30), atol=1e-4)
    u, v, _ = cameras.project(torch.arange(30), torch.tensor([[0.0, 0.0, 0.3]]).expand(30, 3))
    assert bool((v < 8.001).all()), "what is higher in the world is higher in the picture"
    assert torch.isfinite(look_at(torch.tensor([[0.0, 0.0, 2.0]]))).all()


def test_rays_of_pixels_and_of_whole_pictures_agree():
    cameras = Cameras(look_at(torch.tensor([[2.0, 1.0, 0.5]])), torch.tensor([[20.0, 24.0]]), torch.tensor([[5.0, 4.5]]), 6, 10)
    origins, way = cameras.all_rays(0)
    one = cameras.rays(torch.zeros(1, dtype=torch.long), torch.tensor([7.5]), torch.tensor([2.5]))
    assert torch.allclose(way[2 * 10 + 7], one[1][0]) and len(origins) == 60
    _, fine = cameras.all_rays(0, fine=3)
    assert torch.allclose(fine.view(60, 9, 3)[:, 4], way, atol=1e-6)
    straight = F.normalize(torch.tensor([(7.5 - 5) / 20, -(2.5 - 4.5) / 24, -1.0]), dim=0)
    assert torch.allclose(one[1][0], cameras.poses[0, :, :3] @ straight, atol=1e-6)


# ---- exact pictures ----


def test_a_ball_has_the_silhouette_of_a_cone():
    """A ray hits exactly when the sine of its angle to the middle is below r / distance; and the distance is that of the formula."""
    ball = Sphere(radius=0.6, middle=(0.1, -0.2, 0.3))
    camera = torch.tensor([2.0, 1.0, 0.5])
    spread = 0.5 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    way = F.normalize(torch.tensor([0.1, -0.2, 0.3]) - camera + spread, dim=-1)
    found = ball.hit(camera.expand(500, 3), way)
    to = torch.tensor([0.1, -0.2, 0.3]) - camera
    cosine = (way @ to) / to.norm()
    should = (1 - cosine**2).sqrt() < 0.6 / to.norm()
    assert torch.equal(found.distance.isfinite(), should & (cosine > 0)) and 50 < int(should.sum()) < 450
    met = camera + found.distance[should, None] * way[should]
    assert torch.allclose((met - torch.tensor([0.1, -0.2, 0.3])).norm(dim=-1), torch.full((int(should.sum()),), 0.6), atol=1e-4)


def test_a_box_is_met_where_the_nearest_inside_point_is():
    box = Box(half=(0.5, 0.3, 0.2), turn=(25, 10), middle=(0.1, 0.0, -0.1))
    origins = 3 * directions(300, 5)
    way = F.normalize(-origins + 0.6 * directions(300, 6), dim=-1)
    found = box.hit(origins, way)
    steps = torch.linspace(0, 6, 6001)
    local = ((origins[:, None] + steps[:, None] * way[:, None]) - torch.tensor(box.middle)) @ box.axes()
    inside = (local.abs() <= torch.tensor(box.half)).all(-1)
    clear = inside.sum(-1) > 3  # rays that only graze a corner fall between two steps
    first = steps[inside.float().argmax(-1)]
    assert torch.allclose(found.distance[clear], first[clear], atol=2e-3) and int(clear.sum()) > 50
    assert not bool(found.distance.isfinite()[inside.sum(-1) == 0].any()) or int(inside.any(-1).sum()) > 0
    axis = (found.normal[clear] @ box.axes()).abs().max(-1).values
    assert torch.allclose(axis, torch.ones_like(axis), atol=1e-5)
    assert bool(((found.normal * way).sum(-1)[clear] < 0).all()), "a side that is seen faces the camera"


def test_a_letter_seen_from_the_front_is_its_outline():
    """The picture of an extruded letter from far away is the fill of its outline by matplotlib."""
    from matplotlib.path import Path

    outlines = letter_outlines("A")
    letter = Letter(outlines=outlines, thick=0.1)
    grid = torch.rand(800, 2, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    origins = torch.stack([grid[:, 0], torch.full((800,), -5.0), grid[:, 1]], -1)
    found = letter.hit(origins, torch.tensor([[0.0, 1.0, 0.0]]).expand(800, 3))
    inside = torch.zeros(800, dtype=torch.bool)
    for outline in outlines:
        inside ^= torch.from_numpy(Path(outline.numpy()).contains_points(grid.numpy()))
    assert torch.equal(found.distance.isfinite(), inside) and 100 < int(inside.sum()) < 500
    assert torch.allclose(found.distance[inside], torch.tensor(4.9))
    side = letter.hit(torch.tensor([[-5.0, 0.0, -0.6]]), torch.tensor([[1.0, 0.0, 0.0]]))
    every = torch.cat(outlines)
    assert 5 + float(every[:, 0].min()) - 1e-4 < float(side.distance) < 5 and float(side.normal[0, 0]) < 0


def test_the_nearer_body_hides_the_farther():
    red, blue = Sphere(colour=(1.0, 0.0, 0.0), radius=0.3), Sphere(colour=(0.0, 0.0, 1.0), middle=(0.0, 2.0, 0.0), radius=1.0)
    origin = torch.tensor([[0.0, -3.0, 0.0], [0.5, -3.0, 0.0], [2.0, -3.0, 0.0]])
    for order in ([red, blue], [blue, red]):
        colour, hit, far = trace(order, origin, torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3))
        assert hit.tolist() == [1, 1, 0]
        assert float(colour[0, 2]) == 0 < float(colour[0, 0]) and float(colour[1, 0]) == 0 < float(colour[1, 2])
        assert far[:2].tolist() == pytest.approx([2.7, 5 - math.sqrt(0.75)], abs=1e-4)


@pytest.mark.parametrize("name", ["globes", "still-life", "letter"])
def test_embedded_scenes_lie_in_their_cube_and_are_repeatable(name):
    views = open_views(f"scene:{name}", train=3, test=2, size=12)
    again = open_views(f"scene:{name}", train=3, test=2, size=12)
    assert views.fingerprint == again.fingerprint != open_views(f"scene:{name}", train=3, test=2, size=12, seed=1).fingerprint
    assert views.train.colour.shape == (3, 3, 12, 12) and float(views.train.opacity.mean()) > 0.05
    assert bool((views.train.colour <= views.train.opacity + 1e-5).all())
    assert not torch.allclose(views.train.cameras.poses[:2], views.test.cameras.poses)
    from limbeck.rendering.scenes import SCENES

    for number in range(3):
        origins, way = views.train.cameras.all_rays(number)
        _, hit, far = trace(SCENES[name](), origins, way)
        place = (origins + far[:, None] * way)[hit.bool()]
        assert float(place.abs().max()) <= 1


def test_random_pixels_are_those_of_the_pictures():
    views = open_views("scene:globes", train=2, test=1, size=8)
    torch.manual_seed(0)
    origins, way, colour, opacity = views.train.random_pixels(50)
    for number in range(2):
        own, towards = views.train.cameras.all_rays(number)
        for ray in range(50):
            if torch.allclose(origins[ray], own[0]):
                at = (towards - way[ray]).norm(dim=-1).argmin()
                assert torch.allclose(towards[at], way[ray], atol=1e-6)
                assert torch.equal(colour[ray], views.train.colour[number].flatten(1)[:, at])
                assert torch.equal(opacity[ray], views.train.opacity[number].flatten(1)[:, at])


def test_a_field_of_a_ball_is_drawn_as_the_ball():
    """A dense field with the ball's colours, rendered by marching, is the exact picture up to the steps at its rim."""
    ball = Sphere(colour=(0.9, 0.3, 0.1), radius=0.6)

    def field(x, d):
        normal = F.normalize(x, dim=-1)
        from limbeck.rendering.shapes import Hit

        return Said(torch.where(x.norm(dim=-1) < 0.6, 6.0, -20.0), ball.shaded(Hit(torch.zeros(len(x)), normal, torch.zeros(len(x), 2)), d))

    cameras = orbit(2, 24, generator=torch.Generator().manual_seed(0))
    colour, opacity = pictures_of([ball], cameras, fine=1)
    drawn, depth = render_views(field, cameras, 1.0, 128, WHITE)
    truth = colour + (1 - opacity)
    assert float(psnr(drawn, truth).min()) > 30
    assert float(depth[0, 12, 12]) == pytest.approx(2.4, abs=0.05)


# ---- metrics ----


def test_psnr_and_ssim_against_formulas():
    torch.manual_seed(4)
    truth = torch.rand(2, 3, 20, 24)
    made = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    each = psnr(made, truth)
    for number in range(2):
        mse = sum((a - b) ** 2 for a, b in zip(made[number].flatten().tolist(), truth[number].flatten().tolist())) / truth[number].numel()
        assert float(each[number]) == pytest.approx(10 * math.log10(1 / mse), abs=1e-3)
    found = picture_quality(made, truth)
    assert found["psnr"] == pytest.approx(float(each.mean())) and found["worst_psnr"] == pytest.approx(float(each.min()))
    line = torch.arange(11) - 5.0
    window = torch.exp(-(line**2) / (2 * 1.5**2))
    window = (window[:, None] * window / window.sum() ** 2)[None, None].expand(3, 1, 11, 11)

    def blurred(x):
        return F.conv2d(x, window, groups=3)

    a, b = blurred(made), blurred(truth)
    va, vb, ab = blurred(made**2) - a**2, blurred(truth**2) - b**2, blurred(made * truth) - a * b
    ssim = (2 * a * b + 0.01**2) * (2 * ab + 0.03**2) / ((a**2 + b**2 + 0.01**2) * (va + vb + 0.03**2))
    assert found["ssim"] == pytest.approx(float(ssim.mean()), abs=2e-3)
    assert float(psnr(truth, truth).min()) == 100 and "ssim" not in picture_quality(made[..., :8, :8], truth[..., :8, :8])
    with pytest.raises(UserError, match="against"):
        psnr(made, truth[:1])


# ---- a user's own pictures ----


def write_folder(folder, poses, size=10, **more):
    from PIL import Image

    frames = []
    for number, pose in enumerate(poses):
        Image.new("RGBA", (size, size), (200, 100, 50, 128 if number else 255)).save(folder / f"r_{number}.png")
        frames.append({"file_path": f"./r_{number}", "transform_matrix": [*pose.tolist(), [0, 0, 0, 1]]})
    content = {"camera_angle_x": 0.7, "frames": frames, **more}
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def test_a_folder_of_posed_pictures(tmp_path):
    cameras = orbit(9, 10, radius=(4.0, 4.0), generator=torch.Generator().manual_seed(0))
    write_folder(tmp_path, cameras.poses)
    views = open_views(f"posed:{tmp_path}", valid=2)
    assert (len(views.train), len(views.valid), len(views.test)) == (5, 2, 2) and views.around and views.bound == 1.5
    assert torch.allclose(views.train.cameras.poses[0], cameras.poses[1], atol=1e-6)
    assert float(views.train.cameras.focal[0, 0]) == pytest.approx(5 / math.tan(0.35), rel=1e-5)
    assert torch.allclose(views.test.colour[0, :, 0, 0], torch.tensor([200, 100, 50]) / 255)
    assert torch.allclose(views.train.colour[0, :, 0, 0], torch.tensor([200, 100, 50]) / 255 * 128 / 255, atol=1e-6)
    small = open_views(f"posed:{tmp_path}", size=5, bound=1.0, train=3)
    assert small.train.colour.shape == (3, 3, 5, 5)
    assert float(small.train.cameras.focal[0, 0]) == pytest.approx(2.5 / math.tan(0.35), rel=1e-5)


def test_bad_folders_are_told_in_one_line(tmp_path):
    poses = orbit(9, 10, radius=(4.0, 4.0), generator=torch.Generator().manual_seed(0)).poses

    def refused(words, change=None, **args):
        content = write_folder(tmp_path, poses)
        if change is not None:
            change(content)
            (tmp_path / "transforms.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as caught:
            open_views(f"posed:{tmp_path}", **args)
        assert caught.value.hint and "\n" not in caught.value.message

    def frame(key, value, number=3):
        return lambda content: content["frames"][number].__setitem__(key, value)

    turned = [*poses[3].tolist(), [0, 0, 0, 1]]
    refused("last row", frame("transform_matrix", [*turned[:3], [0, 0, 1, 1]]))
    refused("no rotation", frame("transform_matrix", [[2 * x for x in row[:3]] + row[3:] for row in turned[:3]] + [turned[3]]))
    refused("mirrors", frame("transform_matrix", [[-row[0], *row[1:]] for row in turned[:3]] + [turned[3]]))
    refused("no readable transform_matrix", frame("transform_matrix", "identity"))
    refused("not finite", frame("transform_matrix", [[float("nan")] * 4] * 4))
    away = torch.tensor(turned)
    away[:3, 0], away[:3, 2] = -away[:3, 0], -away[:3, 2]
    refused(r"r_3\) at .* sees nothing", frame("transform_matrix", away.tolist()))
    refused("outside the folder", frame("file_path", "../../secret.png"))
    refused("no picture", frame("file_path", "gone.png"))
    refused("neither camera_angle_x", lambda content: content.pop("camera_angle_x"))
    refused("distortion", lambda content: content.__setitem__("k1", 0.1))
    refused("names no frames", lambda content: content.__setitem__("frames", []))
    refused("counted", train=0.5)
    refused("bound", bound=-1)
    refused("leaves none", valid=9)
    with pytest.raises(UserError, match="no folder"):
        open_views("posed:nowhere")
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        open_views(f"posed:{tmp_path}")
    with pytest.raises(UserError, match="unknown scene"):
        open_views("scene:globe")
    with pytest.raises(UserError, match="no posed views"):
        open_views("digits")
