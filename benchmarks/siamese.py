"""Siamese augmentation: limbeck's plain torch against kornia with one draw for a batch, replayed on a second batch.

    python benchmarks/siamese.py [--quick]

An operation that both have is drawn once and applied to real and synthetic samples. Checked first: kornia's replay gives equal pictures
equal results, and ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import absent, middle, parser, row, say, spent
from peers import Absent, need, version
from torch import Tensor

from limbeck.condensation.siamese import Siamese

SHAPES = ((256, 1, 8, 8), (256, 3, 32, 32))


def kornia_pair(operation: Any, real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    """One draw for the real batch, its first row replayed on the synthetic one."""
    first = operation(real)
    params = {key: value[:1].expand(len(synthetic), *value.shape[1:]) if value.ndim and len(value) == len(real) else value
              for key, value in operation._params.items()}  # fmt: skip
    params["forward_input_shape"] = torch.tensor(synthetic.shape)
    return first, operation(synthetic, params=params)


def main() -> None:
    """Print one line of JSON."""
    quick = parser(__doc__).parse_args().quick
    peer = version("kornia")
    try:
        K = need("kornia.augmentation")
    except Absent as why:
        say("siamese", quick, [absent(f"one shared augmentation of two batches, {peer} over limbeck", str(why))])
        return
    theirs: dict[str, Callable[[], Any]] = {
        "rotate": lambda: K.RandomRotation(15.0, same_on_batch=True, p=1.0),
        "scale": lambda: K.RandomAffine(0.0, scale=(1 / 1.2, 1.2), same_on_batch=True, p=1.0),
    }
    result: dict[str, Any] = {}
    for shape in SHAPES[: 1 if quick else 2]:
        real, synthetic = torch.rand(shape), torch.rand(10, *shape[1:])
        for name, make in theirs.items():
            ours, other = Siamese(name), make()
            a, b = kornia_pair(other, real, real[:3].clone())
            torch.testing.assert_close(a[:3], b)
            a, b = ours.pair(real[:3], real)
            torch.testing.assert_close(a, b[:3])
            times: dict[str, list[float]] = {"limbeck": [], "kornia": []}
            for _ in range(2 if quick else 30):
                times["limbeck"].append(spent(lambda o=ours, s=synthetic, r=real: [o.pair(s, r) for _ in range(10)]))
                times["kornia"].append(spent(lambda o=other, s=synthetic, r=real: [kornia_pair(o, r, s) for _ in range(10)]))
            key = f"{name} {'x'.join(map(str, shape))}"
            result[key] = {
                "limbeck_ms": round(100 * middle(times["limbeck"]), 3),
                "kornia_ms": round(100 * middle(times["kornia"]), 3),
                "kornia_over_limbeck": round(middle([k / max(o, 1e-9) for o, k in zip(times["limbeck"], times["kornia"])]), 2),
            }
    title = f"one shared augmentation of two batches, {peer} over limbeck"
    rows = []
    for key, got in result.items():
        note = f"{got['limbeck_ms']} against {got['kornia_ms']} ms"
        rows.append(row(f"{title}: {key}", got["kornia_over_limbeck"], 1.0, higher=True, note=note))
    say("siamese", quick, rows, **result)


if __name__ == "__main__":
    main()
