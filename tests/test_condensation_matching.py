"""Siamese augmentation with numbers of each sample's own, and both kinds against kornia."""

import math

import pytest
import torch

from limbeck.condensation.siamese import OPERATIONS, Draw, Siamese

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(9, 1, 8, 8), (5, 3, 7, 10)])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_sample_gets_numbers_of_its_own(name, shape):
    """A sample of the batch is what the shared operation makes of it alone with that sample's numbers."""
    x = torch.randn(shape)
    torch.manual_seed(3)
    found = Siamese(name)(x)
    torch.manual_seed(3)
    torch.randint(1, ())
    numbers = torch.rand(OPERATIONS[name][1], len(x), 1, 1, 1)
    for i in range(len(x)):
        alone = Siamese.apply(x[i : i + 1], Draw(name, tuple(numbers[:, i].flatten().tolist())))
        assert torch.allclose(found[i : i + 1], alone, atol=1e-5), i
    torch.manual_seed(3)
    assert torch.equal(found, Siamese(name)(x))
    same = x[:1].expand(40, *shape[1:])
    changed = Siamese(name)(same)
    if (name, shape[1]) != ("saturation", 1):  # one channel has no saturation
        assert any(not torch.allclose(changed[0], other) for other in changed[1:])


def test_changes_of_each_sample_are_differentiable():
    for name in OPERATIONS:

        def changed(x, name=name):
            torch.manual_seed(1)
            return Siamese(name)(x)

        x = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        assert torch.autograd.gradcheck(changed, x)


def test_every_shift_of_a_crop_is_as_likely():
    """16 pixels: shifts of -2 to 2, each a fifth of the time."""
    x = torch.zeros(4000, 1, 16, 16)
    x[:, :, 8, 8] = 1
    torch.manual_seed(0)
    rows = Siamese("crop")(x).flatten(1).argmax(1) // 16
    assert torch.allclose(rows.bincount(minlength=16)[6:11] / 4000, torch.full((5,), 0.2), atol=0.03)


@pytest.mark.parametrize("name", ["rotate", "scale"])
def test_warps_agree_with_kornia(name):
    """Kornia maps pixel centres with its own affine warp: the inverse map of what is done to the sampling grid."""
    warp_affine = pytest.importorskip("kornia.geometry.transform").warp_affine
    x, numbers = torch.rand(2, 3, 16, 16), (0.9, 0.2)[: OPERATIONS[name][1]]
    if name == "rotate":
        angle = math.radians(0.4 * 30)
        a = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    else:
        a = torch.diag(torch.tensor([1 / 1.2 + u * (1.2 - 1 / 1.2) for u in numbers]))
    inverse, centre = torch.linalg.inv(a), torch.full((2,), 7.5)
    matrix = torch.cat([inverse, (centre - inverse @ centre)[:, None]], 1).expand(2, 2, 3)
    theirs = warp_affine(x, matrix, (16, 16), align_corners=True)
    assert torch.allclose(Siamese.apply(x, Draw(name, numbers)), theirs, atol=1e-4)
