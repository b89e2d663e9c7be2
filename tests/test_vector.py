"""Bezier chains, rasteriser, outlines, fits, layers, SVG, measures, path autoencoder: against independent formulas."""

import math
import unicodedata
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
import torch

from limbeck.errors import UserError
from limbeck.scenes.path_prior import outlines
from limbeck.vector import (
    DirectDrawing,
    LatentDrawing,
    PathVAE,
    canonical,
    composite,
    coverage,
    evaluate,
    glyph_outlines,
    intersection_rate,
    jaggedness,
    outline_of,
    polyline,
    segments,
    self_intersections,
    signed_area,
    signed_distance,
    split,
    stroke_coverage,
    to_svg,
)
from limbeck.vector.bezier import normalised, reverse, similar, start_at
from limbeck.vector.drawing import circle
from limbeck.vector.fit import resegment
from limbeck.vector.outlines import chains_of, character_of
from limbeck.vector.path_vae import MASK, chamfer, roughness, vae_losses
from limbeck.vector.simplify import layers_of, seen, worth_keeping
from limbeck.vector.svg import Layer, hex_colour, path_data

torch.set_num_threads(1)


def polygon(*corners):
    """A closed chain of straight pieces."""
    points = torch.tensor(corners, dtype=torch.float64)
    return torch.cat([torch.stack([a, a + (b - a) / 3, a + (b - a) * 2 / 3]) for a, b in zip(points, points.roll(-1, 0))])


SQUARE = polygon((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
BOW = polygon((-1, -1), (1, 1), (1, -1), (-1, 1))  # crosses itself once, in the middle
STAR = polygon(*[(math.sin(4 * math.pi * k / 5), math.cos(4 * math.pi * k / 5)) for k in range(5)])  # a pentagram crosses itself five times


# ---- Bezier ----


def test_points_on_a_cubic_against_de_casteljau_and_numpy_polynomials():
    curve = torch.randn(4, 2, dtype=torch.float64)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    found = evaluate(curve, t).numpy()
    for row, at in enumerate(t.tolist()):
        level = list(curve.numpy())
        while len(level) > 1:
            level = [(1 - at) * a + at * b for a, b in pairwise(level)]
        assert np.allclose(found[row], level[0])
    one, x = np.polynomial.Polynomial([1, -1]), np.polynomial.Polynomial([0, 1])
    basis = [one**3, 3 * x * one**2, 3 * x**2 * one, x**3]
    exact = np.stack([sum(b(t.numpy()) * p for b, p in zip(basis, curve.numpy()[:, axis])) for axis in (0, 1)], 1)
    assert np.allclose(found, exact)


def test_the_parts_of_a_cut_curve_are_the_curve():
    curve = torch.randn(4, 2, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    left, right = split(curve, 0.3)
    assert torch.allclose(evaluate(left, t), evaluate(curve, 0.3 * t)) and torch.allclose(
        evaluate(right, t), evaluate(curve, 0.3 + 0.7 * t)
    )


def test_closed_and_open_chains_as_segments():
    points = torch.arange(24.0).reshape(12, 2)
    found = segments(points)
    assert found.shape == (4, 4, 2) and torch.equal(found[3, 3], points[0]) and torch.equal(found[1, 0], points[3])
    strip = segments(torch.arange(14.0).reshape(7, 2), closed=False)
    assert strip.shape == (2, 4, 2) and torch.equal(strip[0, 3], strip[1, 0])
    for wrong in (torch.zeros(7, 2), torch.zeros(6, 3), torch.zeros(6)):
        with pytest.raises(UserError, match="closed path"):
            segments(wrong)
    with pytest.raises(UserError, match="3 S \\+ 1"):
        segments(torch.zeros(6, 2), closed=False)


def test_the_exact_area_against_a_fine_polygon():
    chain = circle(5).double() * 0.7 + 0.1 * torch.randn(15, 2, dtype=torch.float64)
    lines = polyline(chain, 4000)
    following = lines.roll(-1, 0)
    shoelace = 0.5 * (lines[:, 0] * following[:, 1] - lines[:, 1] * following[:, 0]).sum()
    assert math.isclose(float(signed_area(chain)), float(shoelace), rel_tol=1e-6)
    assert math.isclose(float(signed_area(SQUARE)), 1.0) and math.isclose(float(signed_area(reverse(SQUARE))), -1.0)
    assert math.isclose(float(signed_area(circle(16).double())), math.pi, rel_tol=1e-6)


def test_one_canonical_form_whatever_the_start_and_the_direction():
    chain = canonical(circle(6).double() + 0.05 * torch.randn(18, 2, dtype=torch.float64))
    assert float(signed_area(chain)) > 0 and chain[0, 1] == chain[::3, 1].min()
    for start in range(6):
        for other in (start_at(chain, start), reverse(start_at(chain, start))):
            assert torch.allclose(canonical(other), chain)
    assert torch.allclose(
        canonical(start_at(SQUARE, 2))[0], torch.tensor([-0.5, -0.5], dtype=torch.float64)
    )  # of equal heights the leftmost


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (polygon((0, 0), (1, 1), (0, 0)), "no area"),
        (SQUARE * math.nan, "not finite"),
        (torch.zeros(5, 2), "closed path"),
        (SQUARE * 0, "no area"),
    ],
)
def test_degenerate_outlines_are_refused(points, message):
    with pytest.raises(UserError, match=message) as error:
        canonical(points)
    assert error.value.hint
    if message == "no area":
        with pytest.raises(UserError, match="no extent"):
            normalised(points * 0)


def test_a_similarity_turns_counter_clockwise_then_moves():
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    made = similar(points, torch.tensor(2.0).double(), torch.tensor(math.pi / 2, dtype=torch.float64), torch.tensor([1.0, 0.0]).double())
    assert torch.allclose(made, torch.tensor([[1.0, 2.0], [-3.0, 0.0]], dtype=torch.float64))
    assert math.isclose(
        float(signed_area(similar(SQUARE, torch.tensor(3.0).double(), torch.tensor(0.4).double(), torch.zeros(2).double()))), 9.0
    )


def test_a_chain_in_more_and_in_fewer_segments():
    more = resegment(SQUARE, 9)
    assert more.shape == (27, 2) and math.isclose(float(signed_area(more)), 1.0, rel_tol=1e-9)
    assert torch.allclose(coverage(more, 24, per_segment=12), coverage(SQUARE, 24, per_segment=12), atol=1e-6)
    fine = resegment(circle(8).double(), 24)
    fewer = resegment(fine, 8)
    assert fewer.shape == (24, 2) and float((polyline(fewer, 20).norm(dim=1) - 1).abs().max()) < 2e-3
    bump = resegment(SQUARE, 16)
    assert float((coverage(resegment(bump, 4), 24) - coverage(SQUARE, 24)).abs().max()) < 1e-3  # the corners are what stays
    with pytest.raises(UserError, match="at least 2"):
        resegment(SQUARE, 1)


# ---- rasteriser ----


@pytest.mark.parametrize("softness", [0.02, 0.08])
def test_areas_of_a_disc_and_a_square_against_closed_forms(softness):
    """With E[d^2] = pi^2 s^2 / 3 of a logistic edge a disc gains pi E[d^2], a square 4 a d + pi d^2 outside and 4 d^2 - 4 a d inside."""
    variance = math.pi**2 * softness**2 / 3
    pixel = (2 / 96) ** 2
    disc = float(coverage(0.6 * circle(12).double(), 96, softness, 16).sum()) * pixel
    assert math.isclose(disc, math.pi * (0.36 + variance), rel_tol=2e-3)
    square = float(coverage(SQUARE, 96, softness).sum()) * pixel
    assert math.isclose(square, 1 + (math.pi + 4) / 2 * variance, rel_tol=2e-3)


def test_signed_distance_of_a_square_and_which_way_is_up():
    found = signed_distance(polyline(SQUARE, 1), 8)
    centres = (torch.arange(8, dtype=torch.float64) + 0.5) / 4 - 1
    for row, y in enumerate((-centres).tolist()):
        for column, x in enumerate(centres.tolist()):
            over = max(abs(x) - 0.5, 0), max(abs(y) - 0.5, 0)
            expected = -math.hypot(*over) if max(over) > 0 else 0.5 - max(abs(x), abs(y))
            assert math.isclose(float(found[row, column]), expected, abs_tol=1e-5)
    high = coverage(SQUARE + torch.tensor([0.0, 0.5], dtype=torch.float64), 8)
    assert high[:4].sum() > 10 * high[4:].sum()  # y upwards is the top row


def test_winding_rules_differ_where_a_path_runs_twice():
    twice = torch.cat([circle(4).double(), circle(4).double()]) * 0.8
    middle = coverage(twice, 9, rule="nonzero")[4, 4], coverage(twice, 9, rule="evenodd")[4, 4]
    assert middle[0] > 0.9 and middle[1] < 0.1
    assert torch.allclose(coverage(reverse(SQUARE), 8), coverage(SQUARE, 8))
    assert coverage(STAR, 33)[16, 16] > 0.9 and coverage(STAR, 33, rule="evenodd")[16, 16] < 0.1
    with pytest.raises(UserError, match="fill rule"):
        coverage(SQUARE, 8, rule="odd")
    with pytest.raises(UserError, match="0 pixels"):
        coverage(SQUARE, 0)


def test_gradients_of_the_rasteriser_against_finite_differences():
    points = (0.6 * circle(3).double() + 0.05 * torch.randn(9, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: coverage(p, 6, 0.1), points, eps=1e-7, atol=1e-4)
    strip = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    width = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, w: stroke_coverage(p, w, 6, 0.1), (strip, width), eps=1e-7, atol=1e-4)


def test_a_stroke_has_the_area_of_a_line_with_round_ends():
    line = torch.tensor([[-0.5, 0.0], [-0.1, 0.0], [0.2, 0.0], [0.5, 0.0]], dtype=torch.float64)
    found = float(stroke_coverage(line, 0.3, 96, 0.005).sum()) * (2 / 96) ** 2
    assert math.isclose(found, 0.3 + math.pi * 0.15**2, rel_tol=5e-3)
    ring = float(stroke_coverage(0.6 * circle(12).double(), 0.2, 96, 0.005, 16, closed=True).sum()) * (2 / 96) ** 2
    assert math.isclose(ring, 2 * math.pi * 0.6 * 0.2, rel_tol=5e-3)


def test_descent_on_the_picture_moves_a_circle_to_where_another_is():
    goal = coverage(0.4 * circle(6) + torch.tensor([0.3, -0.2]), 24, 0.05)
    shift = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (coverage(0.4 * circle(6) + shift, 24, 0.05) - goal).square().mean().backward()
        optimizer.step()
    assert torch.allclose(shift.detach(), torch.tensor([0.3, -0.2]), atol=0.02)


# ---- measures ----


def test_known_figures_cross_themselves_so_often():
    assert [int(self_intersections(chain)) for chain in (SQUARE, circle(5), BOW, STAR)] == [0, 0, 1, 5]
    assert intersection_rate(torch.stack([circle(4).double(), BOW, BOW, SQUARE])) == 0.5 and intersection_rate(torch.zeros(0, 6, 2)) == 0.0


def test_jaggedness_is_what_a_path_turns_beyond_one_full_turn():
    assert (
        abs(float(jaggedness(SQUARE))) < 1e-6
        and abs(float(jaggedness(circle(7)))) < 1e-4
        and abs(float(jaggedness(reverse(SQUARE)))) < 1e-6
    )
    notch = polygon((-1, -1), (1, -1), (1, 1), (0, 0), (-1, 1))  # the dent turns back by a right angle: twice pi / 2 more
    assert math.isclose(float(jaggedness(notch)), math.pi, rel_tol=1e-6)
    assert jaggedness(torch.stack([SQUARE, SQUARE])).shape == (2,)


# ---- outlines ----


def test_outlines_of_glyphs_have_their_holes_and_names():
    b, o, i = outline_of("B"), outline_of("DIGIT ZERO"), outline_of("i", "DejaVuSerif")
    assert (len(b.chains), len(o.chains), len(i.chains)) == (3, 2, 2)
    assert b.name == "LATIN CAPITAL LETTER B" and o.character == "0" and i.face == "DejaVuSerif"
    assert sorted(float(signed_area(chain)) > 0 for chain in b.chains) in (
        [False, True, True],
        [False, False, True],
    )  # holes run the other way
    points = torch.cat(b.chains)
    assert math.isclose(float((points.amax(0) - points.amin(0)).max()), 2.0, rel_tol=1e-9)
    for chain in b.chains:
        assert int(self_intersections(chain)) == 0
        curves = segments(chain)
        assert torch.allclose(curves[:, 3], curves.roll(-1, 0)[:, 0])


def test_an_outline_is_the_shape_that_matplotlib_draws():
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    drawn = TextPath((0, 0), "S", size=100, prop=FontProperties(family="DejaVu Sans"))
    line = drawn.to_polygons()[0]
    low, high = line.min(0), line.max(0)
    fine = Path((line - (low + high) / 2) / ((high - low).max() / 2))
    centres = (np.arange(32) + 0.5) / 16 - 1
    x, y = np.meshgrid(centres, -centres)
    expected = fine.contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(32, 32)
    found = (coverage(outline_of("S").chains[0], 32, per_segment=8) > 0.5).numpy()
    assert (found != expected).mean() < 0.01


def test_contours_of_every_code_and_wrong_ones():
    vertices = torch.tensor([[0, 0], [1, 0], [2, 1], [1, 2], [0, 2], [0, 1], [-1, 1], [0, 0]], dtype=torch.float64)
    (chain,) = chains_of(vertices, [1, 2, 3, 3, 4, 4, 4, 79])
    curves = segments(chain)
    assert curves.shape[0] == 4  # line, raised quadratic, cubic, closing line
    middle = 0.25 * vertices[1] + 0.5 * vertices[2] + 0.25 * vertices[3]
    assert torch.allclose(evaluate(curves[1], torch.tensor([0.5], dtype=torch.float64))[0], middle)
    assert chains_of(vertices[:2], [1, 2]) == []
    with pytest.raises(UserError, match="code 7"):
        chains_of(vertices[:2], [1, 7])


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda: outline_of("LATIN CAPITAL LETER A"), "no Unicode name", "LATIN CAPITAL LETTER A"),
        (lambda: outline_of("A", "DejaVuSand"), "unknown face", "DejaVuSans"),
        (lambda: outline_of(" "), "no outline", "ink"),
        (lambda: outline_of("\U0001f9ff"), "has no NAZAR", "DejaVu"),
        (lambda: glyph_outlines(" "), "none of the characters", "letters"),
        (lambda: glyph_outlines("A", ["Helvetica"]), "unknown face", "DejaVu"),
    ],
)
def test_characters_without_an_outline(call, message, hint):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert hint in error.value.hint


def test_prompts_are_characters_or_their_names():
    assert character_of("ß") == "ß" and character_of("greek small letter pi") == "π"
    for code in (65, 233, 955):
        assert character_of(unicodedata.name(chr(code))) == chr(code)


# ---- layers ----


def test_layers_lie_over_each_other_in_order():
    masks = torch.rand(3, 4, 4, dtype=torch.float64)
    colours, background = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.3, -0.2], dtype=torch.float64)
    left = torch.stack(
        [torch.prod(torch.stack([1 - masks[j] for j in range(i + 1, 3)] + [torch.ones(4, 4).double()]), 0) for i in range(3)]
    )
    expected = sum(colours[i][:, None, None] * masks[i] * left[i] for i in range(3)) + background[:, None, None] * (1 - masks).prod(0)
    assert torch.allclose(composite(masks, colours, background), expected)
    full = torch.ones(2, 4, 4).double()
    assert torch.allclose(composite(full, colours[:2], background)[:, 0, 0], colours[1])


def drawing(**changes):
    torch.manual_seed(0)
    return DirectDrawing(**{"input_shape": (1, 12, 12), "variants": 2, "paths": 3, "segments": 4, **changes})


def test_drawings_render_what_their_layers_say():
    made = drawing()
    pick = torch.tensor([1, 0])
    assert made.render(pick).shape == (2, 1, 12, 12) and made.render(pick, 30).shape == (2, 1, 30, 30)
    with torch.no_grad():
        made.strength[:] = -40.0
    assert torch.allclose(made.render(pick), torch.full((2, 1, 12, 12), -1.0))
    made.strength.data[1, 2] = 40.0
    lone = coverage(made.points[1, 2], 12)
    assert torch.allclose(made.render(pick)[0, 0], lone * made.colours()[1, 2] - (1 - lone), atol=1e-5)


@pytest.mark.parametrize("changes", [{"input_shape": (1, 12, 10)}, {"paths": 0}, {"segments": 1}, {"background": 2.0}])
def test_drawings_refuse_wrong_sizes(changes):
    with pytest.raises(UserError) as error:
        drawing(**changes)
    assert error.value.hint


def test_layers_that_nobody_sees_are_dropped():
    made = drawing(variants=1)
    with torch.no_grad():
        made.strength[:] = 6.0
        made.points[0, 0] = 0.3 * circle(4)
        made.points[0, 1] = 0.9 * circle(4)  # covers layer 0
        made.points[0, 2] = 0.01 * circle(4)  # too small
        visible = seen(made)[0]
        assert visible[0] < 0.002 and math.isclose(float(visible[1]), math.pi * 0.81 / 4, rel_tol=0.05)
        assert worth_keeping(made).tolist() == [[0, 1, 0]]
        made.strength[0, 1] = -5.0
        assert worth_keeping(made).tolist() == [[1, 0, 0]]
        made.strength[:] = -9.0
        assert worth_keeping(made).sum() == 1  # a drawing is never left without a path


def test_neighbours_of_nearly_one_colour_are_filled_together():
    made = drawing(variants=1, input_shape=(3, 12, 12))
    with torch.no_grad():
        made.strength[:] = 6.0
        made.colour[0] = torch.tensor([[0.5, 0.5, 0.5], [0.52, 0.5, 0.5], [-2.0, 0.5, 0.5]])
        made.points[0, 1] = reverse(made.points[0, 1])
    found = layers_of(made)
    assert [len(layer.chains) for layer in found] == [2, 1] and all(bool(signed_area(c) > 0) for layer in found for c in layer.chains)
    assert math.isclose(float(found[0].colour[0]), (math.tanh(0.5) + math.tanh(0.52)) / 2, rel_tol=1e-5)
    assert len(layers_of(made, near=0.0)) == 3
    made.kept[0, 1] = 0
    assert [len(layer.chains) for layer in layers_of(made)] == [1, 1]
    made.strength.data[0, 0] = 0.0
    assert layers_of(made)[0].opacity == pytest.approx(0.5)


# ---- SVG ----


def test_svg_is_valid_xml_with_escaped_titles_and_flipped_axes():
    layers = [Layer([SQUARE], torch.tensor([1.0])), Layer([SQUARE, BOW], torch.tensor([-1.0, 0.0, 1.0]), 0.25)]
    text = to_svg(layers, 16, torch.tensor([-1.0]), 'A & B <"c"> \x00')
    root = ET.fromstring(text.encode())
    space = "{http://www.w3.org/2000/svg}"
    assert root.attrib["viewBox"] == "0 0 16 16" and root.find(f"{space}title").text == 'A & B <"c"> '
    first, second = root.findall(f"{space}path")
    assert first.attrib["fill"] == "#ffffff" and second.attrib["fill"] == "#0080ff" and second.attrib["fill-opacity"] == "0.250"
    assert first.attrib["d"].startswith("M 4.000 12.000 C") and first.attrib["d"].endswith(
        "4.000 12.000 Z"
    )  # (-0.5, -0.5) is low in the picture
    assert second.attrib["d"].count("M ") == 2 and "fill-opacity" not in first.attrib


def test_svg_paths_read_back_are_the_chain():
    chain = circle(5).double()
    numbers = [float(v) for v in path_data(chain, 10).replace("M", "").replace("C", "").replace("Z", "").split()]
    points = torch.tensor(numbers).reshape(-1, 2)[:-1]
    back = torch.stack([points[:, 0] / 5 - 1, 1 - points[:, 1] / 5], 1)
    assert torch.allclose(back.double(), chain, atol=1e-3)
    with pytest.raises(UserError, match="not finite"):
        path_data(chain * math.inf, 10)
    with pytest.raises(UserError, match="2 channels"):
        hex_colour(torch.zeros(2))


# ---- autoencoder ----


def test_outlines_for_learning_are_canonical_and_do_not_cross():
    data = outlines(8, turns=1, characters="AO")
    assert data.points.shape[1:] == (24, 2) and data.masks.shape[1:] == (MASK, MASK) and len(data) > 40
    assert float(data.points.abs().max()) < 1.6 and bool((signed_area(data.points) > 0).all())
    assert intersection_rate(data.points[::2]) == 0.0
    assert torch.allclose(data.masks[3], coverage(data.points[3], MASK), atol=1e-5)
    with pytest.raises(UserError, match="none of the characters"):
        outlines(8, characters=" ")


def test_the_path_autoencoder_learns_a_few_outlines():
    data = outlines(8, turns=0, characters="O")
    torch.manual_seed(0)
    network = PathVAE(8, 8, 32)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    first = None
    for _ in range(60):
        terms = vae_losses(network, data.points, data.masks, kl=1e-4)
        first = first or {name: float(term.detach()) for name, term in terms.items()}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert float(terms["points"].detach()) < 0.5 * first["points"] and float(terms["picture"].detach()) < 0.7 * first["picture"]
    assert network(data.points, data.masks).shape == data.points.shape


def test_terms_of_the_autoencoder():
    same = circle(8)[None].double()
    assert float(chamfer(same, same)) < 1e-10 and math.isclose(float(chamfer(same, same * 2)), 1.0, rel_tol=0.02)
    flat = torch.zeros(1, 6, 2)
    flat[0, 2] = 1.0
    assert math.isclose(float(roughness(flat)), (4 + 1 + 1) * 2 / 6, rel_tol=1e-6)
    with pytest.raises(UserError, match="path autoencoder"):
        PathVAE(latent=0)


def test_a_drawing_of_latents_places_decoded_paths():
    torch.manual_seed(0)
    made = LatentDrawing((1, 12, 12), variants=2, paths=3, latent=5, width=16)
    with torch.no_grad():
        made.size[:], made.turn[:], made.shift[:] = math.log(0.5), 0.0, 0.25
        assert torch.allclose(made.chains(), 0.5 * made.decoder(made.z) + 0.25, atol=1e-6)
    made.render(torch.tensor([0])).sum().backward()
    assert made.z.grad[0].abs().sum() > 0 and made.z.grad[1].abs().sum() == 0 and made.shift.grad is not None
    assert all(p.grad is None for p in made.decoder.parameters())
