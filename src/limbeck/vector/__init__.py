"""Vector drawings: chains of cubic Bezier curves, a rasteriser with gradients, glyph outlines, layers, SVG. Ground: knows no method.

A closed chain of S cubic segments is a tensor `(..., 3 S, 2)`: anchor, control, control, anchor, ... ; the last segment ends in the first
point. An open one has `3 S + 1` points. Coordinates are (x, y) with y upwards; a drawing's square is [-1, 1] x [-1, 1].
"""

from limbeck.vector.bezier import canonical, evaluate, polyline, segments, signed_area, split
from limbeck.vector.drawing import DirectDrawing, Drawing, composite
from limbeck.vector.measures import intersection_rate, jaggedness, self_intersections
from limbeck.vector.outlines import Outline, glyph_outlines, outline_of
from limbeck.vector.path_vae import LatentDrawing, PathVAE
from limbeck.vector.raster import coverage, signed_distance, stroke_coverage
from limbeck.vector.svg import to_svg

__all__ = [
    "DirectDrawing",
    "Drawing",
    "LatentDrawing",
    "Outline",
    "PathVAE",
    "canonical",
    "composite",
    "coverage",
    "evaluate",
    "glyph_outlines",
    "intersection_rate",
    "jaggedness",
    "outline_of",
    "polyline",
    "segments",
    "self_intersections",
    "signed_area",
    "signed_distance",
    "split",
    "stroke_coverage",
    "to_svg",
]
