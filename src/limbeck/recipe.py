"""What to distil, as data: the schema, reading it from files, changing it from the command line, and errors that help.

A recipe is checked completely before torch or any model is imported. Everything that a recipe says is plain data, so the
resolved recipe in a run's folder is enough to repeat the run.
"""

from __future__ import annotations

import importlib.util
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from limbeck.errors import UserError, unknown

EMBEDDED = Path(__file__).parent / "recipes"
"""The folder of the recipes that come with limbeck."""

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A block of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Method(Strict):
    """Which method, and the settings that differ from its defaults. Written `kd` or `{id: kd, temperature: 2}`."""

    id: str = "kd"
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"id": value}
        if isinstance(value, Mapping):
            value = dict(value)
            settings = dict(value.pop("settings", None) or {})
            id = value.pop("id", "kd")
            return {"id": id, "settings": {**settings, **value}}
        return value


class Data(Strict):
    """Where samples come from. Written `digits` or `{source: digits, labelled: 100}`.

    `source`: an embedded set (`limbeck data`), `hf:<id or folder>`, `folder:<images>`, `csv:<file>`, `parquet:<file>`, `idx:<folder>`.
    `train`, `valid`, `test`: how many samples (or which share) each split gets; `valid` is taken out of the training part.
    `labelled`: how many training samples keep their label (balanced over the classes); the rest stay, without label.
    `seed`: chooses splits and labelled samples. `augment`: e.g. `[shift:1, noise:0.05]`. `label_noise`: wrong training labels on purpose,
    `{share: 0.6, classes: [5, 6]}`. `args`: whatever else the source takes.
    """

    source: str = "digits"
    train: int | float | None = None
    valid: int | float | None = None
    test: int | float | None = None
    labelled: Positive | None = None
    label: str | None = None
    size: Positive | None = None
    channels: Literal[1, 3] | None = None
    seed: int = 0
    augment: list[str] = Field(default_factory=list)
    label_noise: dict[str, Any] | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Training(Strict):
    """How long and how something is trained.

    `epochs` or `steps` (steps win). `lr`, `weight_decay`, `momentum`, `betas` belong to `optimizer`. `schedule` and `warmup` shape the
    learning rate (shares of the run). `clip`: the greatest gradient norm. `ema`: decay of a moving average of the weights, which is
    then what is evaluated and kept. `accumulate`: split each batch into so many parts (same result, less memory).
    `labelled_share`: the share of labelled samples in each batch (default: as they come).
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    batch: Positive = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    warmup: Share = 0.05
    milestones: tuple[Share, ...] = (0.5, 0.75)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    accumulate: Positive = 1
    labelled_share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _whole_parts(self) -> Training:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch ({self.batch})")
        return self


class Schooling(Training):
    """How a model is trained before the distillation begins: a `training` block with its own method and data.

    `method` defaults to `alone` (labels only). `data` changes some keys of the recipe's data for this model (`labelled: null` gives a
    teacher all labels). The result is kept in the user's cache folder, so that it is trained once.
    """

    method: Method = Field(default_factory=lambda: Method(id="alone"))
    data: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0


class Model(Strict):
    """A network. Written `cnn`, or `{model: cnn, args: {width: 8}}`.

    `model`: an embedded network (`limbeck inspect --list`), `hf:<folder or hub id>`, `timm:<name>`, `python:package.module:factory`, or a folder that
    limbeck saved. `weights`: a .safetensors file or such a folder. `train`: train it first, on the recipe's data.
    """

    model: str
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    train: Schooling | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Teacher(Strict):
    """Whoever is learned from. Written like a model, or as a list or a mapping of models (several teachers).

    `kind`: "frozen" (one model, or the mean of several), "online" (learns too), "ema" (moving average of the student),
    "history" (what the student said about each sample an epoch ago), "stored" (outputs written by `limbeck cache`), or "auto": what the
    method asks for. `weights`: how much each of several teachers counts. `decay`: of the moving average. `store`: the folder of stored outputs.
    """

    kind: Literal["auto", "frozen", "online", "ema", "history", "stored"] = "auto"
    models: dict[str, Model] = Field(default_factory=dict)
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    store: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"models": {"teacher": value}}
        if isinstance(value, (list, tuple)):
            return {"models": {f"teacher{number}": item for number, item in enumerate(value, 1)}}
        if isinstance(value, Mapping) and "model" in value:
            own = {key: value[key] for key in ("kind", "decay", "store") if key in value}
            return {**own, "models": {"teacher": {key: item for key, item in value.items() if key not in own}}}
        return value


class Stage(Strict):
    """One part of a distillation in several stages; what is left out is taken from the recipe itself."""

    name: str | None = None
    method: Method | None = None
    teacher: Teacher | None = None
    training: dict[str, Any] = Field(default_factory=dict)


class Attack(Strict):
    """A projected-gradient attack under which robustness is measured: radius and step in units of the inputs, and steps."""

    eps: Annotated[float, Field(gt=0)]
    step: Annotated[float, Field(gt=0)]
    steps: Positive = 20


class Evaluation(Strict):
    """When and on what the student is measured.

    `every`: epochs between measurements (0: only at the end). `on`: the split. `patience`: stop when so many measurements on `valid`
    brought nothing better (needs `valid`; the last weights are kept, never the best on test). `attack`: also measure accuracy under attack.
    `final`: the split of the table at the end; "valid" is for choosing settings without a look at the test split.
    """

    every: Annotated[float, Field(ge=0)] = 0
    on: Literal["valid", "test"] = "valid"
    patience: Positive | None = None
    batch: Positive = 512
    attack: Attack | None = None
    final: Literal["test", "valid"] = "test"


class Checkpoints(Strict):
    """When the state of a run is saved: after so many seconds and, if given, so many steps; the newest `keep` stay."""

    every_seconds: Annotated[float, Field(gt=0)] = 30.0
    every_steps: Positive | None = None
    keep: Positive = 2


class Recipe(Strict):
    """Everything that a run needs to know. See docs/recipes.md for the same in prose."""

    name: str = "run"
    about: str = ""
    method: Method = Field(default_factory=Method)
    teacher: Teacher = Field(default_factory=Teacher)
    student: Model = Field(default_factory=lambda: Model(model="cnn"))
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    stages: list[Stage] = Field(default_factory=list)
    task: Literal["auto", "multiclass", "multilabel", "binary"] = "auto"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    baseline: bool = True
    ceiling: bool = False
    seed: int = 0
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    watch: Annotated[int, Field(ge=0)] | None = None
    stop_on_alarm: bool = False
    trackers: list[str] | Literal["auto"] = "auto"
    device: str = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    threads: Positive | None = None

    @model_validator(mode="after")
    def _has_length(self) -> Recipe:
        if self.training.epochs is None and self.training.steps is None:
            self.training.epochs = 20.0
        return self

    def data_as_written(self) -> dict[str, Any]:
        """The whole recipe as plain data, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included; `limbeck run` takes the file back."""
        return yaml.safe_dump(self.data_as_written(), sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice, and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_FLOAT = r"""^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$|^[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"""
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", __import__("re").compile(_FLOAT), list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML with the safe loader.

    Raises:
        UserError: broken YAML (with line and column), a tag that would build a Python object, or a key that stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if "could not determine a constructor" in problem:
            hint = "recipes hold plain data only; tags such as !!python/... are never read"
        else:
            hint = "check the indentation, the colons and the quotes at that place"
        raise UserError(f"{where}{place}: {problem}", hint) from None
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{where}: {error or type(error).__name__}", "write the recipe as plain, flat YAML") from None


def _annotation_model(annotation: Any) -> type[Strict] | None:
    """The block class behind an annotation such as `Model | None` or `list[Stage]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Strict):
        return annotation
    for inner in reversed(typing.get_args(annotation)):
        if found := _annotation_model(inner):
            return found
    return None


def _block_at(path: Iterable[Any]) -> type[Strict] | None:
    block: type[Strict] | None = Recipe
    for key in path:
        if block is None:
            return None
        if isinstance(key, int) or key not in block.model_fields:
            continue
        block = _annotation_model(block.model_fields[key].annotation)
    return block


def _explain(error: ValidationError, where: str) -> UserError:
    problem = error.errors()[0]
    path = [key for key in problem["loc"] if not (isinstance(key, str) and key.startswith("function-"))]
    place = ".".join(str(key) for key in path) or "recipe"
    if problem["type"] == "extra_forbidden":
        block = _block_at(path[:-1])
        result = unknown("key", place, [".".join([*map(str, path[:-1]), name]) for name in block.model_fields] if block else [])
        return UserError(f"{where}: {result.message}", result.hint)
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return UserError(f"{where}: {place}: {problem['msg'].removeprefix('Value error, ')}{shown}", f"mend `{place}` in the recipe, or with --set {place}=...")


_TEACHER_KEYS = set(Teacher.model_fields)


def expand(raw: Any) -> Any:
    """Write out the short forms of a raw recipe, so that `--set method.temperature=2` or `--set student.args.width=8` find their place."""
    if not isinstance(raw, Mapping):
        return raw
    raw = dict(raw)
    for block in [raw, *[s for s in raw.get("stages") or [] if isinstance(s, dict)]]:
        if isinstance(block.get("method"), str):
            block["method"] = {"id": block["method"]}
        if isinstance(block.get("teacher"), str):
            block["teacher"] = {"model": block["teacher"]}
    if isinstance(raw.get("student"), str):
        raw["student"] = {"model": raw["student"]}
    if isinstance(raw.get("data"), str):
        raw["data"] = {"source": raw["data"]}
    return raw


def override(raw: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` changes to a raw recipe; `c` is read as YAML (`null`, `[1, 2]`, `0.5`, `word`).

    Raises:
        UserError: a change without `=`, or a path that goes through a value that has no parts.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        keys = [key for key in path.strip().split(".") if key]
        if not equals or not keys:
            raise UserError(f"--set {change!r} is not of the form key=value", "for example --set training.epochs=5")
        value = parse_yaml(text, f"--set {path}")
        if keys[0] not in Recipe.model_fields:
            raise unknown("key", keys[0], Recipe.model_fields, "limbeck recipes")
        if len(keys) > 1:
            raw = expand(raw)
        place: Any = raw
        for depth, key in enumerate(keys[:-1]):
            if isinstance(place, list):
                if not key.isdigit() or int(key) >= len(place):
                    raise UserError(f"--set {path}: {'.'.join(keys[:depth])} has no part {key!r}", f"it is a list of {len(place)} parts, counted from 0")
                place = place[int(key)]
                continue
            if place.get(key) is None:
                place[key] = {}
            elif isinstance(place[key], (dict, list)):
                place[key] = place[key].copy()
            else:
                raise UserError(f"--set {path}: {'.'.join(keys[: depth + 1])} is {place[key]!r} and has no parts", "set the whole of it instead")
            place = place[key]
        if isinstance(place, list):
            if not keys[-1].isdigit() or int(keys[-1]) >= len(place):
                raise UserError(f"--set {path}: no such part", f"the list has {len(place)} parts, counted from 0")
            place[int(keys[-1])] = value
        else:
            place[keys[-1]] = value
    return raw


def embedded() -> dict[str, Path]:
    """The recipes that come with limbeck, by name."""
    return {file.stem: file for file in sorted(EMBEDDED.glob("*.yaml"))}


def check_references(recipe: Recipe) -> None:
    """Look up, without importing anything heavy, what a recipe names: the method, and files and folders on disk.

    Raises:
        UserError: the method does not exist, or a named file or folder is missing.
    """
    from limbeck.method import registered

    methods = [recipe.method, *(stage.method for stage in recipe.stages if stage.method)]
    models = [("student", recipe.student), *((f"teacher {name}", model) for name, model in recipe.teacher.models.items())]
    methods += [model.train.method for _, model in models if model.train]
    for method in methods:
        if not method.id.startswith(("python:", "object:")) and method.id not in registered():
            raise unknown("method", method.id, registered(), "limbeck methods")
    prefix, _, rest = recipe.data.source.partition(":")
    if prefix in ("folder", "csv", "parquet", "idx") and not Path(rest).expanduser().exists():
        raise UserError(f"data: there is no {rest}", "check the path; it is read relative to the present folder")
    for role, model in models:
        if model.weights and not Path(model.weights).expanduser().exists():
            raise UserError(f"{role}: there is no {model.weights}", "check `weights`; it is read relative to the present folder")
        if model.model.startswith("python:") and importlib.util.find_spec(model.model.split(":")[1].split(".")[0]) is None:
            raise UserError(f"{role}: no module {model.model.split(':')[1]!r} can be found", "put its folder on PYTHONPATH, or install it")


def resolve(raw: Any, where: str = "recipe", changes: Iterable[str] = ()) -> Recipe:
    """A checked recipe from plain data.

    Args:
        raw: a mapping, as YAML gives it.
        where: what to call it in errors.
        changes: `a.b=c` overrides, applied in order.

    Raises:
        UserError: for everything that is wrong with it, one thing at a time, in one line.
    """
    if raw is None:
        raise UserError(f"{where} is empty", "a recipe needs at least `data`, `student` and `method`; see `limbeck recipes`")
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is a {type(raw).__name__}, not a mapping", "a recipe is made of `key: value` lines")
    if not all(isinstance(key, str) for key in raw):
        raise UserError(f"{where}: every key must be a word", "quote numbers and booleans that are meant as keys")
    try:
        recipe = Recipe.model_validate(override(dict(raw), changes))
    except ValidationError as error:
        raise _explain(error, where) from None
    check_references(recipe)
    return recipe


def load(reference: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or an embedded one by its name.

    Raises:
        UserError: there is no such file or embedded recipe (the nearest names are offered), or it is not a valid recipe.
    """
    reference = str(reference)
    if reference in embedded():
        path = embedded()[reference]
    else:
        path = Path(reference).expanduser()
        if not path.is_file():
            if path.suffix in (".yaml", ".yml") or "/" in reference:
                raise UserError(f"there is no recipe file {reference}", "check the path; `limbeck recipes` lists the embedded ones")
            raise unknown("recipe", reference, embedded(), "limbeck recipes")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{reference} cannot be read: {error}", "a recipe is a UTF-8 text file") from None
    return resolve(parse_yaml(text, reference), reference, changes)
