"""Tables of how many slots each expert got, without tokens: as tools publish them, and as SGLang's
recorder and ``RoutingCallback`` of older versions write them.

Shape letters: T tokens, L layers, K slots, E experts, D domains.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import ArgumentError, TraceError, expected, require
from moe_lab.json_input import mapping, optional, whole, wrong
from moe_lab.number_format import listing
from moe_lab.trace.importing.read_files import (
    check_expansion,
    integers,
    read_arrays,
    read_json,
    read_table,
    read_torch,
)
from moe_lab.trace.importing.records import Document, Sizes, Source

MADE_UP = (
    "Only counts were recorded. Its token rows were made up to have them: load can be read, "
    "nothing about tokens or pairs of experts."
)
MAX_ROWS = 10**8
"""Of made-up rows (tokens x layers); counts of more tokens are refused."""
BLOCK_ROWS = 2**16
_LAYER_KEY = re.compile(r"(?:layer_?)?(\d{1,5})")
_TOP_K = optional(whole(1, 255))


@dataclass(frozen=True)
class Counts:
    """Counts as a file holds them.

    Attributes:
        tables: domain ("" for none) -> [L, E] slots.
        layers: numbers of the layers; None: the file has none.
        top_k, tokens: None: the file has none.
        note: what had to be assumed.
    """

    tables: Mapping[str, np.ndarray]
    layers: tuple[int, ...] | None = None
    top_k: int | None = None
    tokens: int | None = None
    note: str = ""


def counts(src: Path, sizes: Sizes) -> Source:
    """Slots of each expert in each layer, by domain or not: .json (OLMoE's tables too), .npz, .npy,
    or .csv with the columns layer, expert, count and maybe domain.
    """
    readers = {".npz": _of_arrays, ".npy": _of_arrays, ".csv": _of_csv}
    found = readers.get(src.suffix, _of_json)(src, sizes)
    return source_of_counts(
        found.tables, sizes, found.top_k, found.layers, found.tokens, notes=(found.note,)
    )


def source_of_counts(
    tables: Mapping[str, np.ndarray],
    sizes: Sizes,
    top_k: int | None = None,
    layers: tuple[int, ...] | None = None,
    tokens: int | None = None,
    notes: Sequence[str] = (),
) -> Source:
    """Rows that have the given counts, one document for each domain.

    Args:
        tables: domain -> [L, E] slots.
        sizes: of the model. Its ``tokens`` allow layers to have used fewer than K slots each.
        top_k, layers, tokens: of the source, where it has them.

    Raises:
        TraceError: negative counts; ranks in place of counts; layers of a domain with different
            sums, or sums that are no multiple of k: a count was lost; more than ``MAX_ROWS``.
    """
    slots, tokens = top_k or sizes.top_k, sizes.tokens or tokens
    if slots is None:
        what = "the number of slots behind the counts"
        raise ArgumentError(what, "none", "{config} or {top_k}")
    shapes = {table.shape for table in tables.values()}
    require(len(shapes) == 1, "tables of one size", sorted(shapes), error=TraceError)
    (rows, experts) = next(iter(shapes))
    places = sizes.places(rows) if layers is None else None
    named = layers or (tuple(sizes.layers) if sizes.layers and len(sizes.layers) == rows else None)
    if places is not None and len(places) < rows:
        tables = {name: _without_dense(name, table, places) for name, table in tables.items()}
        named = tuple(places)
    numbers = {name: _tokens_of(name, table, slots, tokens) for name, table in tables.items()}
    total = sum(numbers.values()) * len(next(iter(tables.values())))
    require(
        total <= MAX_ROWS,
        f"counts of at most {MAX_ROWS:,} rows (tokens x layers)",
        f"{total:,}",
        "counts of fewer tokens",
        error=TraceError,
    )
    return Source(
        _made_up(tables, numbers, slots),
        experts - sizes.num_zero_experts,
        slots,
        named,
        model=sizes.model,
        per_token=False,
        notes=(MADE_UP, *(note for note in notes if note)),
    )


def _without_dense(domain: str, table: np.ndarray, places: list[int]) -> np.ndarray:
    """The rows of the sparse layers; the dense layers' must be zeros."""
    dense = np.delete(table, places, axis=0)
    require(
        not dense.any(),
        "rows of zeros outside the MoE layers",
        f"counts in {int(dense.any(axis=1).sum())} dense layers of {domain or 'the table'}",
        error=TraceError,
    )
    return table[places]


def _tokens_of(where: str, table: np.ndarray, slots: int, tokens: int | None) -> int:
    """How many tokens a table was counted over; raises for a table that no tokens can have."""
    expect = partial(require, error=TraceError, where=where, field="counts")
    expect(table.size, "counts of at least 0", "an empty table")
    lowest, highest = table.min(), int(table.max())
    expect(lowest >= 0, "counts of at least 0", lowest)
    expect(highest <= 2**53, f"counts of at most {2**53}", highest)
    table = table.astype(np.int64)
    expect(not _are_ranks(table), "counts", "the ranks 0 to E - 1 once in every layer")
    sums = table.sum(axis=1)
    if tokens is None:
        tokens = int(sums[0]) // slots
        if (sums != sums[0]).any() or sums[0] % slots:
            usual = int(np.median(sums)) // slots
            off = int((sums != usual * slots).sum())
            spread = f"{int(sums.min())}..{int(sums.max())} in {len(sums)} layers"
            hint = "the integer counts before rounding, or {tokens}"
            if not sums.all():
                hint = "{config} or {layers} if layers without counts are dense"
            what = f"the same sum of {slots} x tokens in every layer"
            got = f"{spread} ({off} off {slots} x {usual})"
            raise ArgumentError(what, got, hint, where, field="counts")
    what = f"at most {slots} slots of each of {tokens} tokens in a layer"
    expect(int(sums.max()) <= slots * tokens, what, int(sums.max()))
    what = f"at most one slot of each token on an expert ({tokens} tokens)"
    expect(highest <= tokens, what, highest)
    expect(tokens > 0, "counts of at least one token", "zeros alone")
    return tokens


def _are_ranks(table: np.ndarray) -> bool:
    """Whether every layer names each of 0..E-1 once: experts in an order, not counts of them."""
    experts = table.shape[1]
    return experts > 2 and bool((np.sort(table, axis=1) == np.arange(experts)).all())


def _made_up(
    tables: Mapping[str, np.ndarray], tokens: Mapping[str, int], slots: int
) -> Iterator[Document]:
    """Slots sorted by expert and given to the tokens in turn, in blocks: token t has the slots t, t
    + T, ... of the order, and no expert twice, because none has more slots than tokens.
    """
    for number, (domain, table) in enumerate(tables.items()):
        ends, count = np.cumsum(table, axis=1, dtype=np.int64), tokens[domain]
        for start in range(0, count, BLOCK_ROWS):
            place = np.arange(start, min(start + BLOCK_ROWS, count))[:, None]
            place = place + count * np.arange(slots)
            ids = np.stack(
                [
                    np.where(place < end[-1], np.searchsorted(end, place, side="right"), -1)
                    for end in ends
                ],
                axis=1,
            )
            columns = {"domain": [domain] * len(ids)} if domain else {}
            made = np.zeros(len(ids), np.int64)
            yield Document(number, start, ids, token_ids=made, columns=columns, where=domain)


# ------------------------------------------------------------------------------------------------
# files


def sum_of_recorded_counts(files: Sequence[Path]) -> np.ndarray:
    """[L, E] of SGLang's recorder (``logical_count`` [.., L, E]), over its passes and ranks."""
    total: np.ndarray | None = None
    for path in files:
        values = read_torch(path)
        tensor = values.get("logical_count") if isinstance(values, dict) else None
        if tensor is None or not hasattr(tensor, "untyped_storage") or tensor.dim() < 2:
            raise TraceError(expected(f"logical_count in {path.name}", type(values).__name__))
        try:  # tensors without storage or of types that numpy lacks raise one or the other
            claimed, held = (
                tensor.numel() * tensor.element_size(),
                tensor.untyped_storage().nbytes(),
            )
            check_expansion(f"logical_count of {path.name}", claimed, held)
            array = tensor.detach().numpy()
        except (RuntimeError, TypeError, NotImplementedError):
            got = f"{tensor.dtype} on {tensor.device}"
            raise TraceError(expected(f"integers in {path.name}", got)) from None
        if not array.size:
            raise TraceError(expected(f"counts in {path.name}", f"shape {list(array.shape)}"))
        passes = integers(path.name, array.reshape(-1, *array.shape[-2:]), 3)
        table = passes.sum(axis=0, dtype=np.int64)
        if total is not None and total.shape != table.shape:
            what = f"counts of shape {list(total.shape)} in {path.name}"
            raise TraceError(expected(what, list(table.shape)))
        total = table if total is None else total + table
    assert total is not None
    return total


def _of_arrays(src: Path, sizes: Sizes) -> Counts:
    """The first integer table; names of domains and numbers of layers where arrays hold them."""
    arrays = read_arrays(src)
    tables = [array for name, array in arrays.items() if name not in ("layers", "tokens", "step")]
    fitting = [array for array in tables if array.dtype.kind in "iuf" and 1 <= array.ndim <= 3]
    require(
        fitting,
        f"integer counts [layers, experts] or [domains, layers, experts] in {src.name}",
        "none",
        error=TraceError,
    )
    widest = max(fitting, key=lambda array: array.ndim)
    table = np.atleast_2d(integers(src.name, widest, 1, 2, 3))
    layers = _numbers(src.name, arrays.get("layers"), table.shape[-2])
    held = arrays.get("tokens")
    tokens = int(held) if held is not None and held.ndim == 0 and held.dtype.kind in "iu" else None
    if table.ndim == 2:
        return Counts({"": table}, layers, tokens=tokens or None)
    texts = next((item for item in tables if item.dtype.kind == "U" and item.ndim == 1), ())
    names = [str(name) for name in texts]
    if len(set(names)) != len(table):
        names = [str(number) for number in range(len(table))]
    return Counts(dict(zip(names, table, strict=True)), layers)


def _numbers(where: str, array: np.ndarray | None, rows: int) -> tuple[int, ...] | None:
    if array is None:
        return None
    numbers = tuple(int(number) for number in integers(f"{where}: layers", array, 1))
    require(
        len(set(numbers)) == rows and len(numbers) == rows,
        f"{rows} different layers in {where}",
        len(set(numbers)),
        error=TraceError,
    )
    return numbers


def _of_csv(src: Path, sizes: Sizes) -> Counts:
    """One line for each layer and expert (and domain); an expert without a line has no slots."""
    entries: dict[tuple[str, int, int], int] = {}
    for number, row in enumerate(read_table(src), start=2):
        where = f"{src.name}, line {number}"
        values = [_cell(where, row, name) for name in ("layer", "expert", "count")]
        key = (str(row.get("domain") or ""), values[0], values[1])
        require(
            key not in entries,
            "each layer and expert once",
            "a repetition",
            error=TraceError,
            where=where,
        )
        entries[key] = values[2]
    require(entries, f"a line with counts in {src.name}", "none", error=TraceError)
    layers = tuple(sorted({layer for _, layer, _ in entries}))
    listed = max(expert for _, _, expert in entries) + 1
    known = None if sizes.num_experts is None else sizes.num_experts + sizes.num_zero_experts
    experts = known or listed
    require(
        listed <= experts, f"experts below {experts} in {src.name}", listed - 1, error=TraceError
    )
    names = dict.fromkeys(domain for domain, _, _ in entries)
    tables = {name: np.zeros((len(layers), experts), np.int64) for name in names}
    place = {layer: number for number, layer in enumerate(layers)}
    for (domain, layer, expert), count in entries.items():
        tables[domain][place[layer], expert] = count
    note = (
        f"The {listed} experts are those that {src.name} lists; give num_experts if there are more."
    )
    return Counts(tables, layers, note="" if known else note)


def _cell(where: str, row: Mapping[str, str], name: str) -> int:
    value = (row.get(name) or "").strip()
    require(
        re.fullmatch(r"\d{1,15}(\.0*)?", value),
        f"a whole number as {name}",
        repr(value[:40]),
        error=TraceError,
        where=where,
    )
    number = int(float(value))
    require(
        name == "count" or number <= 99_999,
        f"{name} of at most 99,999",
        number,
        error=TraceError,
        where=where,
    )
    return number


def _of_json(src: Path, sizes: Sizes) -> Counts:
    values, where = read_json(src), src.name
    if isinstance(values, list):
        return Counts({"": np.atleast_2d(integers(where, values, 1, 2))})
    values = mapping(values, f"tables of counts in {where}")
    if "counts" not in values:
        return _by_domain(where, values, sizes.model)
    table = values["counts"]
    top_k = _TOP_K(values.get("top_k"), f"{where}: top_k")
    tokens = optional(whole(1))(values.get("tokens"), f"{where}: tokens")
    where = f"{where}: counts"
    if isinstance(table, dict):
        layers, rows = _layered(where, table)
        return Counts({"": rows}, layers, top_k, tokens)
    rows = np.atleast_2d(integers(where, table, 1, 2))
    held = values.get("layers")
    layers = _numbers(where, None if held is None else np.asarray(held), len(rows))
    return Counts({"": rows}, layers, top_k, tokens)


def _by_domain(where: str, values: Mapping[str, Any], model: str) -> Counts:
    """Tables as OLMoE has them: model -> kind -> domain -> layer -> counts, where outer levels may
    be missing.
    """
    if _is_table(values):
        layers, table = _layered(where, values)
        return Counts({"": table}, layers)
    if "expert_counts" in values:
        found = _by_domain(
            where, mapping(values["expert_counts"], f"{where}: expert_counts"), model
        )
        return Counts(found.tables, found.layers, _top_k_of(where, values, found.tables, model))
    if values and all(isinstance(item, dict) and _is_table(item) for item in values.values()):
        tables = {name: _layered(f"{where}: {name}", table) for name, table in values.items()}
        numbers = {layers for layers, _ in tables.values()}
        require(
            len(numbers) <= 1,
            f"the same layers in every domain of {where}",
            f"{len(numbers)} sets of layers",
            error=TraceError,
        )
        return Counts({name: table for name, (_, table) in tables.items()}, numbers.pop())
    if not isinstance(values.get(model), dict):
        what = f"one of the models {listing(list(map(str, values)))} in {where}"
        raise ArgumentError(what, repr(model) if model else "no name", "{model}")
    return _by_domain(where, values[model], model)


def _top_k_of(
    where: str, values: Mapping[str, Any], tables: Mapping[str, np.ndarray], model: str
) -> int | None:
    """k, where the file has the counts of all choices and of the first choice alone."""
    if "expert_counts_top1" not in values:
        return None
    where = f"{where}: expert_counts_top1"
    first = _by_domain(where, mapping(values["expert_counts_top1"], where), model).tables
    pairs = [(tables[name].sum(), table.sum()) for name, table in first.items() if name in tables]
    ratios = {int(every) / int(one) for every, one in pairs if one > 0}
    ratio = ratios.pop() if len(ratios) == 1 else 0.0
    return int(ratio) if ratio == int(ratio) and 1 <= ratio <= 255 else None


def _is_table(values: Mapping[str, Any]) -> bool:
    return bool(values) and all(_LAYER_KEY.fullmatch(str(key)) for key in values)


def _layered(where: str, table: Mapping[str, Any]) -> tuple[tuple[int, ...], np.ndarray]:
    """Numbers of the layers, and [L, E]: layer -> counts, or layer -> expert -> count."""
    if not _is_table(table):
        raise wrong(where, "layers and their counts", table)
    keys = sorted(table, key=_layer_number)
    numbers = tuple(_layer_number(key) for key in keys)
    if len(set(numbers)) < len(numbers):
        twice = next(
            key for key, number in zip(keys, numbers, strict=True) if numbers.count(number) > 1
        )
        raise TraceError(f"{where}: " + expected("each layer once", f"{twice!r} and another name"))
    rows = [_row(f"{where}: {key}", table[key]) for key in keys]
    return numbers, integers(where, rows, 2)


def _layer_number(key: str) -> int:
    match = _LAYER_KEY.fullmatch(key)
    assert match is not None
    return int(match[1])


def _row(where: str, values: Any) -> Any:
    """Counts of one layer, given as expert -> count too; all experts must be there."""
    if not isinstance(values, dict):
        return values
    number = whole()
    experts = {str(place) for place in range(len(values))}
    require(
        set(values) == experts,
        f"each expert from 0 to {len(values) - 1}",
        "other names",
        error=TraceError,
        where=where,
    )
    return [number(values[str(place)], f"{where}: {place}") for place in range(len(values))]
