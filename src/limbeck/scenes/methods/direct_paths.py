"""Control points optimised directly: what neural paths are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from limbeck import schema
from limbeck.method import Card
from limbeck.scenes.drawing_method import DrawingMethod
from limbeck.scenes.score_method import PictureProblem, build_student


@dataclass
class DirectPaths(DrawingMethod):
    """Every control point is a parameter; the score objective, the rasteriser and the cleaning are those of `t2v-npr`.

    Nothing keeps neighbouring points in order, so paths may fold and cross themselves.
    """

    card = Card(
        id="direct-paths",
        title="VectorFusion: Text-to-SVG by Abstracting Pixel-Based Diffusion Models",
        year=2022,
        wing="scenes",
        family="baseline",
        claim="Vector drawings from text without vector data, by optimising control points under a picture model.",
        equation="theta = control points, colours; grad_theta = (eps_pre - eps_phi) d R / d theta",
        arxiv="2211.11319",
        baseline="",
        certainty="recalled",
        deviations="variational score distillation in place of the paper's plain one, so that only the paths differ from t2v-npr",
    )
    contract = {"width": 16}

    def make_student(self, spec: schema.Model, problem: PictureProblem) -> nn.Module:
        return build_student(spec, problem, "drawing")
