"""Routes of requests, as vLLM, SGLang, TensorRT-LLM and what stands around them record them.

None of them records scores, and only a route log has weights. An answer's last token is never fed,
so it has no route; its token row says so. Routes come as nested lists, as base64 of int32 or of an
.npy file, or as an object with ``data``, ``shape`` and ``dtype``. Shape letters: T tokens, L
layers, K slots.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import ArgumentError, TraceError, expected, require
from moe_lab.json_input import anything, list_of, mapping, one_of, optional, record, text, whole
from moe_lab.trace.importing import read_files
from moe_lab.trace.importing.expert_counts import source_of_counts, sum_of_recorded_counts
from moe_lab.trace.importing.read_files import array_of_bytes, read_arrays, read_json, read_lines
from moe_lab.trace.importing.records import Document, Sizes, Source

NPY = b"\x93NUMPY"
TOKENS = ("token_ids", "input_ids")
SUFFIXES = (".npy", ".npz", ".json", ".jsonl")

_TOKEN_IDS = optional(list_of(whole(0, 2**32 - 1)))
_ANSWER = record(
    token_ids=_TOKEN_IDS,
    output_ids=_TOKEN_IDS,
    output_token_ids=_TOKEN_IDS,
    meta_info=optional(mapping, {}),
)
_RESPONSE = record(
    prompt_token_ids=_TOKEN_IDS,
    prompt_ids=_TOKEN_IDS,
    input_ids=_TOKEN_IDS,
    choices=optional(list_of(_ANSWER)),
    outputs=optional(list_of(_ANSWER)),
)
_ENCODED = record(
    data=text(2**30),
    shape=list_of(whole(0, 2**31), 3),
    dtype=text(16),
    start=optional(whole(0, 2**32 - 1), 0),
)
_ROUTE = record(
    req_id=optional(one_of(text(4096), whole()), ""),
    token_idx=whole(0, 2**32 - 1),
    layer=whole(0, 99_999),
    topk_ids=list_of(whole(-1, 65_535), 255),
    topk_weights=optional(list_of(anything, 255)),
)
_LOG_HEADER = record(
    model_id=optional(text(), ""),
    top_k=optional(whole(1, 255)),
    num_experts=optional(whole(1, 65_535)),
)


def vllm(src: Path, sizes: Sizes) -> Source:
    """``CompletionOutput.routed_experts``: [tokens, layers, slots] for each request, in .npy, .npz,
    .json or .jsonl; or a route log, one line of JSON for each token and layer.
    """
    files = find_files(src, SUFFIXES)
    log = next((path for path in files if _is_route_log(path)), None)
    return _route_log(log, sizes) if log is not None else _source(files, sizes)


def trtllm(src: Path, sizes: Sizes) -> Source:
    """Routes of TensorRT-LLM: [tokens - 1, MoE layers, slots] for each request, in files as for
    ``vllm``.
    """
    return _source(find_files(src, SUFFIXES), sizes)


def sglang(src: Path, sizes: Sizes) -> Source:
    """Responses with ``meta_info.routed_experts`` (base64 of int32 [tokens - 1, layers, slots]), or
    the recorder's ``.pt`` of counts.
    """
    recorded = find_files(src, (".pt",), missing=False)
    if recorded:
        return source_of_counts({"": sum_of_recorded_counts(recorded)}, sizes)
    return _source(find_files(src, SUFFIXES), sizes)


def find_files(src: Path, suffixes: tuple[str, ...], missing: bool = True) -> list[Path]:
    """``src``, or the files in it that have one of these suffixes, rank2 before rank10."""
    files = [src] if src.is_file() else [path for path in src.iterdir() if path.is_file()]
    files = [path for path in files if path.suffix in suffixes]
    require(files or not missing, f"{' or '.join(suffixes)} at {src}", "none", error=TraceError)
    return sorted(files, key=lambda path: _natural(path.name))


def _source(files: list[Path], sizes: Sizes) -> Source:
    requests = (request for path in files for request in _of_file(path))
    documents = (
        _document(number, where, routes, token_ids, sizes)
        for number, (where, routes, token_ids) in enumerate(requests)
    )
    return Source(documents, top_k=sizes.top_k, aliases_zero_experts=True)


def _document(number: int, where: str, routes: list, token_ids: Any, sizes: Sizes) -> Document:
    tokens = None if token_ids is None else read_files.ids(where, token_ids, 1)
    count = None if tokens is None else len(tokens)
    parts = [_routes(where, part, count, sizes) for part in routes]
    start = next((part["start"] for part in routes if isinstance(part, dict)), 0)
    shapes = {part.shape[1:] for part in parts}
    require(len(shapes) <= 1, "routes of one size", sorted(shapes), error=TraceError, where=where)
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if tokens is not None:
        tokens = tokens[start:]
        require(
            len(tokens) - len(ids) in (0, 1),
            f"routes of {len(tokens)} tokens, or of all but the last",
            len(ids),
            error=TraceError,
            where=where,
        )
    return Document(number, start, ids, token_ids=tokens, where=where)


def _of_file(path: Path) -> Iterator[tuple[str, list, Any]]:
    """(name for messages, parts of the routes, token ids or None) of each request in a file."""
    if path.suffix in (".npy", ".npz"):
        arrays = read_arrays(path)
        names = [
            name for name in arrays if arrays[name].ndim == 3 and arrays[name].dtype.kind in "iu"
        ]
        if not names:
            shapes = [f"{name} {item.dtype}{list(item.shape)}" for name, item in arrays.items()]
            what = f"an integer array [tokens, layers, slots] in {path.name}"
            raise TraceError(expected(what, ", ".join(shapes[:4])))
        for name in sorted(names, key=_natural):
            suffix = name.partition("routed_experts")[2] if "routed_experts" in name else name
            tokens = next((arrays[key + suffix] for key in TOKENS if key + suffix in arrays), None)
            yield f"{path.name} {name}".strip(), [arrays[name]], tokens
        return
    if path.suffix == ".jsonl":
        responses = (
            (f"{path.name}, record {number}", response)
            for number, (_, response) in enumerate(read_lines(path), start=1)
        )
    else:
        values = read_json(path)
        listed = values if isinstance(values, list) else [values]
        responses = ((f"{path.name}, record {n}", value) for n, value in enumerate(listed, 1))
    for where, response in responses:
        for answer in _answers(where, _RESPONSE(response, where)):
            yield where, *answer


def _answers(where: str, response: dict[str, Any]) -> Iterator[tuple[list, Any]]:
    """(parts of the routes, token ids) of each answer; a prompt's routes may be beside it."""
    prompts = (response[name] for name in ("prompt_token_ids", "prompt_ids", "input_ids"))
    prompt = next((ids for ids in prompts if ids), None)
    answers = response["choices"] or response["outputs"] or [_ANSWER(response, where)]
    for answer in answers:
        inner = {**answer, **answer["meta_info"]}
        names = ("routed_experts", "expert_ids", "routing")
        routes = next((inner[name] for name in names if inner.get(name) is not None), None)
        if routes is None:
            got = f"fields {', '.join(sorted(answer))[:120]}"
            raise TraceError(f"{where}: " + expected("routed_experts in each response", got))
        made = answer["output_ids"] or answer["output_token_ids"]
        if prompt:
            made = made or answer["token_ids"]
        token_ids = answer["token_ids"] if made is None and not prompt else None
        if made is not None:
            token_ids = [*(prompt or []), *made]
        before = response.get("prompt_routed_experts")
        parts = [routes] if before is None else [before, routes]
        checked = [_ENCODED(part, where) if isinstance(part, dict) else part for part in parts]
        yield checked, token_ids


def _routes(where: str, routes: Any, tokens: int | None, sizes: Sizes) -> np.ndarray:
    """[T, L, K] from one of the forms that routes come in."""
    if isinstance(routes, dict):
        data = _decoded(where, routes["data"])
        if data.startswith(NPY):
            return read_files.ids(where, array_of_bytes(data, where), 3)
        return read_files.ids(where, _raw(where, data, routes["dtype"], routes["shape"]), 3)
    if not isinstance(routes, str):
        return read_files.ids(where, routes, 3)
    data = _decoded(where, routes)
    if data.startswith(NPY):
        return read_files.ids(where, array_of_bytes(data, where), 3)
    flat = _raw(where, data, "int32", [-1])
    if sizes.top_k is None:
        what = "the number of slots of encoded routes"
        raise ArgumentError(what, "none", "{config} or {top_k}", where)
    layers = _layers_of(len(flat), tokens, sizes)
    if not layers or len(flat) % (layers * sizes.top_k):
        what, got = f"routes [tokens, layers, {sizes.top_k}]", f"{len(flat)} numbers"
        raise ArgumentError(what, got, "{config} or {layers}", where)
    return read_files.ids(where, flat.reshape(-1, layers, sizes.top_k), 3)


def _decoded(where: str, encoded: str) -> bytes:
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)  # in lines as well
    except (binascii.Error, ValueError):
        got = repr(encoded[:40])
        raise TraceError(
            f"{where}: " + expected("base64 of int32 routes", got), field="dtype"
        ) from None


def _raw(where: str, data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """Numbers without a header."""
    require(
        re.fullmatch(r"u?int(8|16|32|64)", dtype),
        "dtype of integers, such as int32",
        repr(dtype),
        error=TraceError,
        where=where,
    )
    try:
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    except ValueError:
        got = f"{len(data)} bytes"
        raise TraceError(f"{where}: " + expected(f"{dtype} of shape {shape}", got)) from None


def _layers_of(numbers: int, tokens: int | None, sizes: Sizes) -> int | None:
    """Layers of encoded routes: all or the sparse ones, as the number of tokens allows."""
    known = [count for count in (sizes.num_layers, len(sizes.layers or ())) if count]
    if tokens is None:
        return known[0] if known else None
    rows = [count * (sizes.top_k or 1) for count in (tokens - 1, tokens) if count > 0]
    fitting = [numbers // row for row in rows if numbers % row == 0]
    return next((count for count in fitting if count in known or not known), None)


# ------------------------------------------------------------------------------------------------
# route logs


def _is_route_log(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    head = [line for _, line in zip(range(2), read_lines(path), strict=False)]
    return any("topk_ids" in values or values.get("type") == "route" for _, values in head)


def _route_log(path: Path, sizes: Sizes) -> Source:
    """One line for each request, token and layer, after a line of ``type`` "meta" or none."""
    first = next(read_lines(path), None)
    header: dict[str, Any] = {}
    if first is not None and first[1].get("type") == "meta":
        header = _LOG_HEADER(first[1], first[0])
    routes = [
        (where, _ROUTE(values, where))
        for where, values in read_lines(path)
        if values.get("type", "route") == "route"
    ]
    require(routes, f"a route in {path.name}", "none", error=TraceError)
    layers = tuple(sorted({route["layer"] for _, route in routes}))
    slots = header.get("top_k") or sizes.top_k or max(len(route["topk_ids"]) for _, route in routes)
    weighted = all(route["topk_weights"] is not None for _, route in routes)
    documents = _logged(routes, layers, slots, weighted)
    return Source(
        documents,
        header.get("num_experts"),
        slots,
        layers,
        model=header.get("model_id", ""),
        has_weights=weighted,
        aliases_zero_experts=True,
    )


def _logged(
    routes: list[tuple[str, dict[str, Any]]], layers: tuple[int, ...], slots: int, weighted: bool
) -> Iterator[Document]:
    """A document for each request, in the order of their first line; tokens without gaps."""
    order = {
        request: number for number, request in enumerate(dict.fromkeys(_request(r) for r in routes))
    }
    routes = sorted(routes, key=lambda item: (order[_request(item)], item[1]["token_idx"]))
    for number, (_, group) in enumerate(groupby(routes, key=_request)):
        lines = list(group)
        where, first = lines[0][0], lines[0][1]["token_idx"]
        tokens = lines[-1][1]["token_idx"] - first + 1
        if len(lines) != tokens * len(layers):
            what = f"{tokens * len(layers)} lines ({tokens} tokens x {len(layers)} layers)"
            raise TraceError(f"{where}: " + expected(f"{what} of its request", len(lines)))
        ids = np.full((tokens, len(layers), slots), -1, np.int32)
        weights = np.zeros(ids.shape, np.float32) if weighted else None
        filled = np.zeros(ids.shape[:2], bool)
        for where, route in lines:
            place = (route["token_idx"] - first, layers.index(route["layer"]))
            chosen = route["topk_ids"]
            require(
                not filled[place] and len(chosen) <= slots,
                f"each token and layer once, with at most {slots} slots",
                "another line",
                error=TraceError,
                where=where,
            )
            filled[place], ids[place][: len(chosen)] = True, chosen
            if weights is not None:
                weights[place][: len(chosen)] = _weights(where, route, len(chosen))
        yield Document(number, first, ids, weights, where=lines[0][0])


def _weights(where: str, route: dict[str, Any], count: int) -> np.ndarray:
    try:
        values = np.asarray(route["topk_weights"], np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0)
    require(
        values.shape == (count,), f"{count} topk_weights", "others", error=TraceError, where=where
    )
    return values


def _request(line: tuple[str, dict[str, Any]]) -> Any:
    return line[1]["req_id"]


def _natural(name: str) -> list[Any]:
    """rank2 before rank10."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]
