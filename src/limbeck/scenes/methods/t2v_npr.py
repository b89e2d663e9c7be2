"""Text-to-vector generation with neural path representation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from limbeck import schema
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.scenes.drawing_method import DrawingMethod
from limbeck.scenes.path_prior import CHARACTERS, path_network
from limbeck.scenes.score_method import PictureProblem, build_student


@dataclass
class T2VNPR(DrawingMethod):
    """Each path is a latent of an autoencoder that has seen real paths only, so that every latent decodes to a sane one.

    theta = (z, scale, turn, place, colour, opacity) of each layer; variational score distillation on the picture of the layers, plus
    lam_z mean |z|^2, which keeps latents where the autoencoder knows them; then layers are dropped and refitted to the cleaned picture.
    """

    card = Card(
        id="t2v-npr",
        title="Text-to-Vector Generation with Neural Path Representation",
        year=2024,
        wing="scenes",
        family="drawing",
        claim="Vector graphics from text with paths that are regular, where optimised control points cross themselves and are jagged.",
        equation="theta = {z_i, T_i, c_i};  grad_theta = (eps_pre - eps_phi) d R / d theta + lam_z grad |z|^2;  then |R - I*|^2 + overlap",
        arxiv="2405.10317",
        baseline="direct-paths",
        certainty="recalled",
        deviations=(
            "weights are working values; the prompt is a class of a small score model; the autoencoder learns outlines of the DejaVu fonts "
            "in 8 segments; a few paths instead of 128"
        ),
    )
    contract = {"width": 16, "path_steps": 3, "path_width": 16, "path_characters": "AO"}

    lam_z: float = setting(0.05, "weight of mean |z|^2 (a working value)", at_least=0)
    latent: int = setting(24, "numbers of a path's latent (paper: 24)", at_least=1)
    path_characters: str = setting(CHARACTERS, "whose outlines the autoencoder learns, in every DejaVu face")
    path_steps: int = setting(1000, "steps of the autoencoder's training, once", at_least=1)
    path_width: int = setting(64, "width of the autoencoder, a multiple of 4", at_least=4)
    path_kl: float = setting(0.01, "weight of the autoencoder's prior (0.01, recalled)", at_least=0)

    def make_student(self, spec: schema.Model, problem: PictureProblem) -> nn.Module:
        made = build_student(spec, problem, "latent-drawing", latent=self.latent, width=self.path_width)
        vae = path_network(made.count, self.latent, self.path_width, self.path_steps, self.path_kl, problem.session, self.path_characters)
        made.decoder.load_state_dict(vae.decoder.state_dict())
        return made

    def extra_losses(self, pick: Tensor, x: Tensor, clock: Clock) -> dict[str, Tensor]:
        return {"prior": self.lam_z * self.problem.student.z[pick].square().mean()} if self.lam_z else {}
