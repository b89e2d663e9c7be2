"""Handing a student on: ONNX that is checked against the model, and safetensors with its configuration."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import storage
from limbeck.errors import UserError
from limbeck.zoo.quantised import is_coded, unfold

_HINT = "pip install 'limbeck[onnx]'"


class _Plain(nn.Module):
    """The model seen as tensors in, one tensor out, which is what an ONNX graph is."""

    def __init__(self, model: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs))) if self.names else self.model(*inputs)
        if hasattr(output, "logits"):
            return output.logits
        if isinstance(output, Mapping):
            return output["logits"] if "logits" in output else next(iter(output.values()))
        return output[0] if isinstance(output, (tuple, list)) else output


def _parts(inputs: Any) -> tuple[list[str] | None, tuple[Tensor, ...]]:
    if isinstance(inputs, Mapping):
        return list(inputs), tuple(inputs.values())
    return None, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _to_file(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], path: str) -> str:
    """Write the graph, with the dynamo exporter where it works, else with the tracing one; returns which it was.

    Inputs that are tokens have a free length too, where the dynamo exporter manages that.
    """
    options: dict[str, Any] = {"input_names": names, "output_names": ["logits"]}
    batch = torch.export.Dim("batch", min=1)
    if all(not x.is_floating_point() and x.ndim == 2 for x in inputs):
        length = torch.export.Dim("length", min=2, max=inputs[0].shape[1])
        shapes = (tuple({0: batch, 1: length} for _ in inputs),)
        try:
            torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **options)
            return "dynamo"
        except Exception:  # a fixed length then
            pass
    try:
        shapes = (tuple({0: batch} for _ in inputs),)
        torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **options)
        return "dynamo"
    except Exception:  # whatever the newer exporter cannot do is tried with the older one, whose error then counts
        axes = {name: {0: "batch"} for name in [*names, "logits"]}
        torch.onnx.export(model, inputs, path, dynamo=False, dynamic_axes=axes, **options)
        return "trace"


def export_onnx(model: nn.Module, example_inputs: Any, path: str | Path, *, real_inputs: Any, tolerance: float = 1e-3) -> dict[str, Any]:
    """Write a model as ONNX with a free batch size, and check the file with onnxruntime before it gets its name.

    Args:
        model: any module whose output is a tensor, or has or begins with the logits; it is exported in evaluation mode on the CPU.
        example_inputs: tensor `(B, ...)`, dict or tuple for the trace; B >= 2 keeps the batch from being taken for a constant (a
            single sample is doubled).
        path: the `.onnx` file; it is whole or absent.
        real_inputs: samples of the data, in the same structure, on which the file must give the model's outputs.
        tolerance: largest allowed difference, as a share of the largest absolute output (at least 1).

    Returns:
        `path`, `bytes`, `opset`, `exporter`, `inputs` (names), `max_abs_difference`, `top1_agreement` (None when outputs are not
        `(N, C)`), `samples`.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs {error.name}", _HINT) from None
    if is_coded(model):
        model = unfold(copy.deepcopy(model))  # the graph holds the weights that the codes stand for
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys, examples = _parts(example_inputs)
    _, real = _parts(real_inputs)
    names = keys or (["inputs"] if len(examples) == 1 else [f"input_{i}" for i in range(len(examples))])
    examples = tuple(x.detach().cpu() if len(x) > 1 else torch.cat([x, x]).detach().cpu() for x in examples)
    real = tuple(x.detach().cpu() for x in real)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    plain = _Plain(model, keys).cpu().eval()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp.onnx")
    os.close(handle)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it warns of torchvision's absence, which limbeck does not use
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exporter = _to_file(plain, examples, names, temporary)
            expected = plain(*real)
        content = Path(temporary).read_bytes()
        graph = onnx.load_from_string(content)
        onnx.checker.check_model(graph)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), real)}
        got = torch.from_numpy(session.run(None, feed)[0])
        if got.shape != expected.shape:
            raise UserError(
                f"the ONNX file answers with shape {tuple(got.shape)}, the model with {tuple(expected.shape)}", "use safetensors instead"
            )
        difference = float((got - expected).abs().max()) if got.numel() else 0.0
        scale = max(1.0, float(expected.abs().max())) if got.numel() else 1.0
        if not difference <= tolerance * scale:
            raise UserError(
                f"the ONNX file differs from the model by {difference:.3g} on {len(expected)} inputs (allowed: {tolerance * scale:.3g})",
                "nothing was written; does the model act at random or depend on the batch in evaluation mode?",
            )
        storage.write_bytes(path, content)
    finally:
        Path(temporary).unlink(missing_ok=True)
        logger.setLevel(level)
        model.to(device)
        for module, training in modes:
            module.training = training
    two = expected.ndim == 2 and expected.shape[1] > 1
    return {
        "path": str(path),
        "bytes": len(content),
        "opset": next(int(o.version) for o in graph.opset_import if o.domain in ("", "ai.onnx")),
        "exporter": exporter,
        "inputs": names,
        "max_abs_difference": difference,
        "top1_agreement": float((got.argmax(1) == expected.argmax(1)).double().mean()) if two else None,
        "samples": len(expected),
    }


def export_safetensors(model: nn.Module, path: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `model.safetensors` and `config.json` into a folder.

    Tensors that share storage are written once under each of their names, so the file loads with a plain `load_state_dict`.

    Args:
        model: any module.
        path: the folder; made when missing.
        config: what is needed to build the module again (its name and arguments, classes, input shape); the class name, the
            number of parameters and the weights' checksum are added.

    Returns:
        What was written to `config.json`.
    """
    folder = Path(path)
    digest = storage.save_tensors(folder / "model.safetensors", {k: v.clone() for k, v in model.state_dict().items()}, {"format": "pt"})
    written = {
        **(config or {}),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "params": sum(p.numel() for p in model.parameters()),
        "sha256": digest,
    }
    storage.write_json(folder / "config.json", written)
    return written
