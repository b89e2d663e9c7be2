"""Networks that are trained on the real data before the condensation begins (squeezed networks, committees)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import __version__, models, schema, storage
from limbeck.condensation.problem import Problem
from limbeck.condensation.students import StudentsProgram, real_lessons
from limbeck.data import Data
from limbeck.engine.session import Session
from limbeck.errors import UserError


def teacher_networks(recipe: schema.Recipe, data: Data, session: Session, given: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Every network of the recipe's `teacher` block by name: given as an object, loaded, or trained once on standardised inputs.

    Raises:
        UserError: a `train` block asks for what this wing does not do, or a network cannot read the data.
    """
    if "teacher" in given:
        value = given["teacher"]
        found = dict(value) if isinstance(value, Mapping) else {"teacher": value}
    else:
        found = {name: _one(name, spec, recipe, data, session) for name, spec in recipe.teacher.models.items()}
    for name, network in found.items():
        network.to(session.device)
        models.check_input(network, data, session, f"teacher {name}")
    return found


def _one(name: str, spec: schema.Model, recipe: schema.Recipe, data: Data, session: Session) -> nn.Module:
    network = models.build(spec, data, spec.train.seed if spec.train else 0, f"teacher {name}")
    if spec.train is None:
        return network
    school = spec.train
    if school.method.id != "alone" or school.data:
        raise UserError(
            f"teacher {name} of a condensation is trained on the labels of the recipe's data",
            "leave method and data out of its train block",
        )
    content = {
        "model": spec.model_dump(exclude={"train"}),
        "start": storage.tensors_fingerprint(network.state_dict()),
        "train": school.model_dump(exclude={"method", "data"}),
        "data": data.fingerprint,
        "augment": recipe.data.augment,
        "inputs": "standardised",
        "limbeck": __version__,
        "device": session.device.type,
    }

    def train(work: Path, key: str) -> nn.Module:
        problem = Problem(data, schema.Condense(), network, session)
        batches = real_lessons(problem, school.batch, recipe.data.augment, school.seed)
        program = StudentsProgram([network.to(session.device)], batches, school, [school.lr])
        session.fit(program, f"teacher-{name}", seed=school.seed, folder=work, digest=key, evaluate=False)
        return network.eval()

    return models.kept(content, network, session, f"teacher {name}", train)
