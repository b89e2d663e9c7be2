"""Cameras, rays, volume rendering, exact pictures of simple shapes, and posed views from a folder. Knows no field, no method."""

from limbeck.rendering.cameras import Cameras, look_at, orbit
from limbeck.rendering.density import clamp_inward, truncated_exp
from limbeck.rendering.marching import Rendered, composite, cube_bounds, depths_along, render, render_views
from limbeck.rendering.views import Views, open_views

__all__ = [
    "Cameras",
    "Rendered",
    "Views",
    "clamp_inward",
    "composite",
    "cube_bounds",
    "depths_along",
    "look_at",
    "open_views",
    "orbit",
    "render",
    "render_views",
    "truncated_exp",
]
