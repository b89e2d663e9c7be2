"""Models, data and programs of the language benchmarks. Imported by processes of peers too: limbeck is imported inside functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def llama(vocabulary: int, layers: int, width: int, length: int, seed: int) -> nn.Module:
    """A model with random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    inner = 8 * width // 3
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, intermediate_size=inner, **sizes, **special)
    return LlamaForCausalLM(config)


def job(vocabulary: int, length: int, texts: Tensor, labels: Tensor | None = None) -> tuple[Any, Any]:
    """Data of whole rows of tokens, and the task."""
    from limbeck.data import Data
    from limbeck.data.split import TensorSplit
    from limbeck.data.text import Text
    from limbeck.tasks import Language

    text = Text(None, "causal-lm", length, vocabulary, pad=0, eos=None)  # type: ignore[arg-type]
    split = TensorSplit({"input_ids": texts}, texts if labels is None else labels)
    return Data("tokens", split, split, None, (length,), (), "causal-lm", "tokens", text=text), Language(text)


def program(method: Any, student: nn.Module, teacher: Any, data: Any, task: Any, batch: int, steps: int, lr: float = 1e-3) -> Any:
    """A training of limbeck's engine, not begun."""
    from limbeck import schema
    from limbeck.engine.loop import Loop, Plan
    from limbeck.knowledge.program import KnowledgeProgram

    training = schema.Training(steps=steps, batch=batch, lr=lr, weight_decay=0, schedule="constant", warmup=0)
    made = KnowledgeProgram(method, student, teacher, data, task, training)
    return made, Loop(made, Plan(training, steps, watch=0))
