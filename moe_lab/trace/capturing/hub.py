"""A pretrained model of transformers over a corpus: ``trace_pretrained``. Nothing is downloaded
unless the model is named by an id.

Documents are sorted by length so that a batch holds little padding; each is one row, numbered by
its place in the corpus. The loss of a token comes from the same pass. Where the tokenizer says
which characters a token covers, its classes of ``moe_lab.text`` are recorded too. Shape letters: B
batch, S sequence, V vocabulary.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_lab.document_pass import length_batches, pad_right
from moe_lab.errors import CorpusError, TraceError, expected, require
from moe_lab.progress import shown, tell
from moe_lab.text import Corpus, TokenizedDocument
from moe_lab.trace.capturing.class_columns import Described
from moe_lab.trace.capturing.fingerprints import corpus_hash, rank_folder
from moe_lab.trace.capturing.long_documents import cache_that_joins, parts, run_part
from moe_lab.trace.capturing.recorder import capture
from moe_lab.trace.existing import refuse_finished
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.publish import INCOMPLETE_SUFFIX
from moe_lab.trace.reader import open_trace

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Loading:
    """The way to load a model: ``dtype`` (auto, float32, bfloat16, float16), ``device``, or a
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
    overwrite: bool = False,
) -> Trace:
    """Load a model and trace it over the documents of ``corpus``; goes on with an interrupted trace
    of the same model and text.

    Args:
        model_id: a folder of saved weights and tokenizer (the network is then not touched), or the
            id of a model.
        max_tokens: leading tokens of each document.
        batch_tokens: tokens of one forward pass, padding included. A longer document runs in parts
            that see the parts before through a cache; where the model goes on from none, in windows
            that do not see each other, which a note counts. Logits are made in chunks of a fixed
            size.
        progress: show tokens done and time left on the error stream, if it is a terminal.
        overwrite: replace a finished trace at ``folder``.

    Raises:
        TraceExistsError: a finished trace at ``folder`` without ``overwrite``.
        TraceError: a model that cannot be loaded or has no routers. CorpusError: no document of two
            tokens.
    """
    target, texts = Path(folder), [document.text for document in corpus.documents]
    new = {"model": str(model_id), "corpus_hash": corpus_hash(texts), "max_tokens": max_tokens}
    if not overwrite:  # before the model is loaded
        refuse_finished(rank_folder(target), new)
    with nullcontext() if progress and sys.stderr.isatty() else _no_bars():
        model, tokenizer = load_pretrained(model_id, loading)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    documents, notes = tokenized(corpus, tokenizer, max_tokens, positions)
    require(
        documents,
        "a document of at least two tokens",
        "none",
        "longer text, or a larger --max-tokens",
        error=CorpusError,
    )
    if corpus.num_repeated:
        notes.append(f"Left out for repeating another document's text: {corpus.num_repeated}.")
    causal = hasattr(model, "lm_head") or model.get_output_embeddings() is not None
    head = ModelHead(model) if causal and model.base_model is not model else None
    run = model if head is None else model.base_model
    new_cache = None
    if long := [document for document in documents if len(document.ids) > batch_tokens]:
        probe = torch.from_numpy(long[0].ids[None].astype(np.int64)).to(model.device)
        new_cache = cache_that_joins(model, run, probe)
        if new_cache is None:
            some = f"Documents longer than {batch_tokens:,} tokens that ran in windows of that size"
            notes.append(
                f"{some}, which do not see each other, since {type(model).__name__} does not go on "
                f"from a cache: {len(long)}."
            )
    captured = capture(
        model,
        target,
        tokenizer=tokenizer,
        text=texts,
        losses=head or causal,
        resume=(target.parent / (target.name + INCOMPLETE_SUFFIX)).exists(),
        overwrite=overwrite,
        max_tokens=max_tokens,
        model_id=str(model_id),
        created_from=created_from,
        notes=notes,
    )
    described = Described(tokenizer, model.config.get_text_config().vocab_size)
    with torch.no_grad(), captured, shown(progress):
        left = [document for document in documents if document.index not in captured.finished]
        done, total = 0, sum(len(document.ids) for document in left)
        for batch in length_batches(left, batch_tokens):
            ids, mask = pad_right(batch, tokenizer.pad_token_id)
            numbers = np.array([document.index for document in batch])
            columns = described.columns(batch, ids.shape[1])
            ids, mask = ids.to(model.device), mask.to(model.device)
            width = ids.shape[1]
            cache = new_cache() if new_cache is not None and width > batch_tokens else None
            for part in parts(width, batch_tokens, cache is not None):
                captured.documents(
                    numbers,
                    np.full(len(batch), part.start),
                    **{name: values[:, part] for name, values in columns.items()},
                )
                run_part(run, ids, mask, part, cache)
                done += int(mask[:, part].sum())
                tell("tracing tokens", done, total)
    return open_trace(target, verify=False)


class ModelHead:
    """The part of a causal model after its last layer: head, scaling and softcap.

    A batch of logits over a large vocabulary can take more memory than the model. The layers are
    therefore run alone (``base_model``), and this makes the logits of a few positions at a time, by
    the model's own ``forward`` with the layers' output given.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.body = model, model.base_model

    def __call__(self, output: Any, row: int, positions: slice) -> torch.Tensor:
        """[n, V] logits of one row's positions."""
        hidden = output.last_hidden_state[row : row + 1, positions]
        part = replace(output, last_hidden_state=hidden)
        self.body.forward = lambda *args, **kwargs: part
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.body.forward


def load_pretrained(model_id: str | Path, loading: Loading) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer). A folder is read with the network off.

    Raises ``TraceError`` for a model that cannot be loaded, and for one that needs code of its own
    unless ``loading`` trusts it.
    """
    try:
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForCausalLM,
            AutoTokenizer,
        )
    except ImportError as error:
        raise TraceError(
            "expected the extra hf, got no transformers; try pip install 'moe_lab[hf]'"
        ) from error
    local, name = Path(model_id).exists(), str(model_id)
    placed = {"device_map": loading.device_map} if loading.device_map else {}
    source = {"local_files_only": local, "trust_remote_code": loading.trust_remote_code}
    dtype = loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)
    try:
        require(
            loading.trust_remote_code or not _needs_code(model_id, local),
            "a model that transformers knows",
            f"{model_id}, which needs Python code that came with it (auto_map)",
            "--trust-remote-code if you trust that code",
            error=TraceError,
        )
        config = AutoConfig.from_pretrained(name, **source)
        require(
            not config.is_encoder_decoder,
            "a model with one stream of tokens",
            f"{model_id}, an encoder-decoder",
            "moe_lab.trace.capture(model, folder, only='decoder') around passes of your own",
            error=TraceError,
            field="model_id",
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        # Of a folder without tokenizer files transformers makes an empty tokenizer of the family.
        require(
            len(tokenizer) > len(tokenizer.all_special_ids),
            f"the tokenizer of the model in {name}",
            "none there, or one without tokens",
            "tokenizer.save_pretrained(FOLDER)",
            error=TraceError,
            field="tokenizer",
        )
        remote = getattr(config, "auto_map", None) or {}
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
        kind: Any = AutoModelForCausalLM if causal else AutoModel
        model, report = kind.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **source, **placed
        )
    except TraceError:
        raise
    # Whatever a damaged file makes transformers, safetensors or json raise is the file's fault.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TraceError(
            f"cannot load {model_id}: {reason}; try a folder with config.json, weights "
            "and tokenizer"
        ) from error
    _check_weights(name, report)
    return (model if placed else model.to(loading.device)).eval(), tokenizer


def _check_weights(name: str, report: Mapping[str, Any]) -> None:
    """Raise ``TraceError`` for weights that the files lack: transformers draws them at random."""
    mismatched = [
        item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]
    ]
    absent = sorted(map(str, [*report["missing_keys"], *mismatched]))
    if absent:
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        what = f"all weights of the model in {name}"
        raise TraceError(expected(what, f"none that fit for {some}", "the complete checkpoint"))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which it draws in pipes too."""
    if importlib.util.find_spec("transformers") is None:  # loading says so
        yield
        return
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


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


def tokenized(
    corpus: Corpus, tokenizer: Any, max_tokens: int | None, positions: Any
) -> tuple[list[TokenizedDocument], list[str]]:
    """Documents of at least two tokens, with the characters that each token covers (empty spans
    where the tokenizer does not say); and notes on what was cut.

    Args:
        max_tokens: leading tokens of each document that are kept; None: all.
        positions: the most that the model takes, or None.
    """
    kept, cut, lost, total = [], 0, 0, 0
    fast = bool(getattr(tokenizer, "is_fast", False))
    limit = positions if isinstance(positions, int) and positions > 0 else None
    for index, document in enumerate(corpus.documents):
        encoded = tokenizer(document.text, return_offsets_mapping=fast, verbose=False)
        ids = np.array(encoded["input_ids"], dtype=np.int32)[:max_tokens]
        total += len(ids)
        if limit is not None and len(ids) > limit:
            cut, lost = cut + 1, lost + len(ids) - limit
            ids = ids[:limit]
        spans = np.zeros((len(ids), 2), np.int32)
        if fast:
            spans = np.array(encoded["offset_mapping"], np.int32).reshape(-1, 2)[: len(ids)]
        if len(ids) > 1:
            kept.append(
                TokenizedDocument(
                    index, document.name, document.text, ids, spans[:, 0], spans[:, 1]
                )
            )
    if not cut:
        return kept, []
    sentence = f"Documents cut at the model's {limit:,} positions: {cut}"
    return kept, [f"{sentence}; {lost:,} of {total:,} tokens were left out."]
