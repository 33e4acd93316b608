"""A pretrained model of transformers over a corpus: ``trace_pretrained``. Nothing is downloaded
unless the model is named by an id.

Documents are sorted by length so that a batch holds little padding; each is one row, numbered by
its place in the corpus. The loss of a token comes from the same pass, and the classes of
``moe_lab.text`` stand beside it where the tokenizer tells which characters it covers. Shape
letters: B batch, S sequence, V vocabulary.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from moe_lab.document_pass import length_batches, pad_right
from moe_lab.errors import CorpusError, TraceError, expected
from moe_lab.text import Corpus, TokenizedDocument, token_classes
from moe_lab.trace.capturing.recorder import capture
from moe_lab.trace.publish import INCOMPLETE_SUFFIX
from moe_lab.trace.reader import Trace, open_trace

BATCH_TOKENS = 4096
CLASS_COLUMNS = (
    "start",
    "end",
    "n_bytes",
    "lexer",
    "subword",
    "unicode",
    "case",
    "copy",
    "repeat",
    "position",
    "boundary",
    "function",
)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: ``dtype`` (auto, float32, bfloat16, float16), ``device``, or a
    ``device_map`` of accelerate.

    ``trust_remote_code`` lets Python files that came with the model run. False refuses such a model
    and never asks on standard input.
    """

    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False


def trace_pretrained(
    model_id: str | Path,
    corpus: Corpus,
    folder: Path | str,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    loading: Loading = Loading(),
    created_from: str = "",
    progress: bool = True,
) -> Trace:
    """Load a model and trace it over the documents of ``corpus``; goes on with an interrupted trace
    of the same model and text.

    Args:
        model_id: a folder of saved weights and tokenizer (the network is then not touched), or the
            id of a model.
        max_tokens: leading tokens of each document.
        batch_tokens: tokens of one forward pass, padding included.
        progress: tell tokens done and time left on the error stream.

    Raises:
        TraceError: a model that cannot be loaded or has no routers. CorpusError: no document of two
            tokens.
    """
    model, tokenizer = load_pretrained(model_id, loading)
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = [length for length in (max_tokens, limit) if isinstance(length, int) and length > 0]
    documents = tokenized(corpus, tokenizer, min(lengths, default=None))
    if not documents:
        raise CorpusError(
            expected(
                "a document of at least two tokens", "none", "longer text, or a larger --max-tokens"
            )
        )
    causal = hasattr(model, "lm_head") or model.get_output_embeddings() is not None
    target = Path(folder)
    resume = (target.parent / (target.name + INCOMPLETE_SUFFIX)).exists()
    texts = (document.text for document in corpus.documents)
    described = Described(tokenizer, model.config.get_text_config().vocab_size)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text": texts,
        "losses": causal,
        "resume": resume,
        "model_id": str(model_id),
    }
    with torch.no_grad(), capture(model, target, created_from=created_from, **options) as captured:
        left = [document for document in documents if document.index not in captured.finished]
        meter = Meter(sum(len(document.ids) for document in left), sys.stderr if progress else None)
        for batch in length_batches(left, batch_tokens):
            ids, mask = pad_right(batch, tokenizer.pad_token_id)
            columns = described.columns(batch, ids.shape[1])
            captured.documents(np.array([document.index for document in batch]), **columns)
            model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
            )
            meter.add(int(mask.sum()))
    return open_trace(target, verify=False)


def load_pretrained(model_id: str | Path, loading: Loading) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer). A folder is read with the network off.

    Raises ``TraceError`` for a model that cannot be loaded, and for one that needs code of its own
    unless ``loading`` trusts it.
    """
    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TraceError(
            "expected the extra hf, got no transformers; try pip install 'moe_lab[hf]'"
        ) from error
    local = Path(model_id).exists()
    placed = {"device_map": loading.device_map} if loading.device_map else {}
    source = {"local_files_only": local, "trust_remote_code": loading.trust_remote_code}
    options = {
        "dtype": loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype),
        **source,
        **placed,
    }
    try:
        if not loading.trust_remote_code and _needs_code(model_id, local):
            got = f"{model_id}, which needs Python code that came with it (auto_map)"
            raise TraceError(
                expected(
                    "a model that transformers knows",
                    got,
                    "--trust-remote-code if you trust that code",
                )
            )
        tokenizer = AutoTokenizer.from_pretrained(str(model_id), **source)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(model_id), **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            model = AutoModel.from_pretrained(str(model_id), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TraceError(
            f"cannot load {model_id}: {reason}; try a folder with config.json, weights "
            f"and tokenizer"
        ) from error
    return (model if placed else model.to(loading.device)).eval(), tokenizer


def _needs_code(model_id: str | Path, local: bool) -> bool:
    """Whether only Python files that came with the model can build it; none of them is imported to
    find out.
    """
    import transformers
    from transformers import CONFIG_MAPPING, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config, _ = PreTrainedConfig.get_config_dict(str(model_id), local_files_only=local)
    model = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
    tokenizer = get_tokenizer_config(str(model_id), local_files_only=local)
    return model or (
        "auto_map" in tokenizer and not hasattr(transformers, str(tokenizer.get("tokenizer_class")))
    )


def tokenized(corpus: Corpus, tokenizer: Any, max_tokens: int | None) -> list[TokenizedDocument]:
    """Documents of at least two tokens, with the characters that each token covers (empty spans
    where the tokenizer cannot tell).
    """
    found = []
    for index, document in enumerate(corpus.documents):
        fast = bool(getattr(tokenizer, "is_fast", False))
        encoded = tokenizer(
            document.text,
            return_offsets_mapping=fast,
            truncation=max_tokens is not None,
            max_length=max_tokens,
        )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        spans = np.array(
            encoded["offset_mapping"] if fast else [(0, 0)] * len(ids), dtype=np.int32
        ).reshape(-1, 2)
        if len(ids) > 1:
            found.append(
                TokenizedDocument(
                    index, document.name, document.text, ids, spans[:, 0], spans[:, 1]
                )
            )
    return found


class Described:
    """Class columns of a batch by the rules of ``moe_lab.text``, for tokenizers of transformers."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        size = max(len(tokenizer), vocab_size)
        pieces = [tokenizer.decode([number]) for number in range(len(tokenizer))] + [""] * (
            size - len(tokenizer)
        )
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.vocab_size = size
        self.token_lengths = np.array([len(piece.encode()) for piece in pieces], dtype=np.int64)
        self.is_fragment = np.array(["\ufffd" in piece for piece in pieces], dtype=bool)
        special = getattr(tokenizer, "bos_token_id", None)
        self.eos_id = -1 if special is None else special

    def columns(self, batch: Sequence[TokenizedDocument], width: int) -> dict[str, np.ndarray]:
        """[B, S] of each class column; nothing where the tokenizer gives no spans."""
        if not self.fast:
            return {}
        frames = [token_classes(document, self) for document in batch]  # type: ignore[arg-type]
        columns: dict[str, np.ndarray] = {}
        for name in [column for column in CLASS_COLUMNS if column in frames[0].columns]:
            rows = [frame[name].to_list() for frame in frames]
            text = isinstance(
                next((value for row in rows for value in row if value is not None), ""), str
            )
            filled = np.full((len(batch), width), "" if text else 0, dtype=object)
            for place, row in enumerate(rows):
                filled[place, : len(row)] = row
            columns[name] = filled.astype(str) if text else filled.astype(np.int64)
        return columns


class Meter:
    """Tokens done, share and time left, on one line at most once a second."""

    def __init__(self, total: int, stream: TextIO | None) -> None:
        self.total, self.stream, self.done = max(total, 1), stream, 0
        self.began = self.told = time.monotonic()

    def add(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if self.stream is None or (now - self.told < 1 and self.done < self.total):
            return
        self.told = now
        seconds = round((now - self.began) * (self.total - self.done) / self.done)
        left = f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
        end = "\n" if self.done >= self.total else ""
        print(
            f"\r{self.done:,} of {self.total:,} tokens, {self.done / self.total:.0%}, {left} left ",
            end=end,
            file=self.stream,
            flush=True,
        )
