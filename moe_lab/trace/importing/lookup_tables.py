"""Tables of expert lookups: ``route_trace v1`` of engines that stream experts, and the CSV of
llama.cpp's ``moe-trace``.

Both have one line for each slot. They are read in blocks of bounded size, plain or gzipped.
Shape letters: T tokens, L layers, K slots.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.json_input import whole
from moe_lab.trace.importing.read_files import check_expansion, check_file
from moe_lab.trace.importing.records import Document, Sizes, Source
from moe_lab.trace.schema import MAX_CHOICES, MAX_LAYERS, MAX_TOP_K

BLOCK_BYTES = 2**25
MAX_LINE = 2**16
LINE_BYTES = 8
"""The shortest line of a table: what one line pays for in memory, times ``read_files.MAX_RATIO``.
"""
PHASES = np.array(["prefill", "decode"])
ROUTE_TRACE = "# route_trace v1"
_ROUTE: dict[str, type[pl.DataType]] = {
    "turn": pl.Int64,
    "phase": pl.Int64,
    "step": pl.Int64,
    "layer": pl.Int64,
    "slot": pl.Int64,
    "expert": pl.Int64,
    "weight": pl.Float32,
}
_PAIR: dict[str, type[pl.DataType]] = {"layer": pl.Int64, "expert": pl.Int64}
_NAME = re.compile(r"model=(.*?)(?: arch=|$)")
_WHOLE = re.compile(r"\b(layer|expert_bytes|n_expert|n_expert_used)=(\d{1,18})\b")
_HEADER = {
    "layer": whole(0, 99_999),
    "expert_bytes": whole(0, 2**50),
    "n_expert": whole(1, MAX_CHOICES),
    "n_expert_used": whole(1, MAX_TOP_K),
}


def route_trace(src: Path, sizes: Sizes) -> Source:
    """``route_trace v1``: comment lines with the model and the bytes of one expert of each layer,
    then turn, phase (0 prefill, 1 decode), step, layer, slot, expert, weight.

    A turn is a document and a step one of its tokens. Bytes and slots are those that the engine ran
    with.
    """
    first, comments, body = _opened(src)
    require(
        first == ROUTE_TRACE,
        f"{src.name} to begin with {ROUTE_TRACE!r}",
        repr(first)[:60],
        error=TraceError,
    )
    header, bytes_of = _header(src.name, comments)
    slots = header.get("n_expert_used") or sizes.top_k
    require(
        slots and bytes_of,
        f"n_expert_used and a line for each layer in the comments of {src.name}",
        "neither" if not slots and not bytes_of else "one of them",
        error=TraceError,
    )
    layers = np.array(sorted(bytes_of))
    return Source(
        _turns(src.name, _frames(src.name, body, _ROUTE), layers, slots),  # type: ignore
        header.get("n_expert"),
        slots,
        tuple(layers.tolist()),
        model=header["model"],
        has_weights=True,
        has_token_ids=False,
        expert_bytes=tuple(bytes_of[layer] for layer in layers.tolist()),
        notes=("A token without a line in a layer is listed as one that used no slot there.",),
    )


def llama_cpp(src: Path, sizes: Sizes) -> Source:
    """The CSV of llama.cpp's ``moe-trace``: layer, expert, one line for each slot in the order of
    evaluation.

    Lines of one layer that stand together are the tokens of one pass; a pass of one token is a
    decoded one. A layer with fewer lines than others of its pass ran the last tokens alone (the
    last layer of a prompt).
    """
    if sizes.top_k is None:
        raise TraceError(expected("the number of slots of a token", "none", "--top-k or --config"))
    first, _, body = _opened(src)
    headed = first.replace(" ", "") == "layer,expert"
    frames = list(_frames(src.name, body, _PAIR, None if headed else first))
    table = pl.concat(frames) if frames else pl.DataFrame(schema=_PAIR)
    require(table.height, f"lines of layer and expert in {src.name}", "none", error=TraceError)
    layer, expert, slots = table["layer"].to_numpy(), table["expert"].to_numpy(), sizes.top_k
    layers, place = np.unique(layer, return_inverse=True)
    begins = np.flatnonzero(np.append(True, layer[1:] != layer[:-1]))
    lengths = np.diff(np.append(begins, len(layer)))
    require(
        not (lengths % slots).any() and layers[0] >= 0 and layers[-1] <= 99_999,
        f"layers from 0 to 99999 and {slots} lines for each token and layer in {src.name}",
        "others",
        "another --top-k",
        error=TraceError,
    )
    run_layer = layer[begins]
    passes = np.cumsum(np.append(False, run_layer[1:] <= run_layer[:-1]))
    tokens = np.zeros(int(passes[-1]) + 1, np.int64)
    np.maximum.at(tokens, passes, lengths // slots)
    ends = np.cumsum(tokens)
    from_end = np.repeat(begins + lengths, lengths) - np.arange(len(layer)) - 1
    pos = np.repeat(ends[passes], lengths) - 1 - from_end // slots
    shape = (int(ends[-1]), len(layers), slots)
    check_expansion(src.name, 4 * int(np.prod(shape)), LINE_BYTES * len(layer))
    ids = np.full(shape, -1, np.int32)
    ids[pos, place, slots - 1 - from_end % slots] = _bounded(src.name, "expert", expert)
    phase = np.repeat(PHASES[(tokens == 1).astype(int)], tokens)
    document = Document(0, 0, ids, columns={"phase": phase.tolist()}, where=src.name)
    return Source(
        [document],
        top_k=slots,
        layers=tuple(layers.tolist()),
        has_token_ids=False,
        notes=("Passes of one token are taken as decoded tokens, longer ones as the prompt.",),
    )


def _opened(src: Path) -> tuple[str, list[str], Iterator[bytes]]:
    """The first line, the comment lines after it, and the rest in blocks of whole lines."""
    size = check_file(src)
    opener: Any = gzip.open if src.suffix == ".gz" else open
    file: IO[bytes] = opener(src, "rb")
    first, comments = _line(file, src.name), []
    line = _line(file, src.name)
    while line.startswith("#"):
        comments.append(line)
        require(
            len(comments) <= MAX_LAYERS + 64,
            f"at most {MAX_LAYERS} layers in {src.name}",
            "more",
            error=TraceError,
        )
        line = _line(file, src.name)
    return first, comments, _blocks_of(file, line.encode() + b"\n", size, src.name)


def _line(file: IO[bytes], where: str) -> str:
    try:
        return file.readline(MAX_LINE).decode("utf-8").rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise TraceError(expected(f"a table of text in {where}", type(error).__name__)) from None


def _blocks_of(file: IO[bytes], begun: bytes, size: int, where: str) -> Iterator[bytes]:
    with file:
        total, kept = 0, begun
        while True:
            try:
                data = file.read(BLOCK_BYTES)
            except (EOFError, OSError, zlib.error) as error:
                raise TraceError(expected(f"a whole file {where}", str(error)[:80])) from None
            total += len(data)
            check_expansion(where, total, size)
            lines, mark, last = (kept + data).rpartition(b"\n")
            kept = last if data else b""
            if lines.strip() or (not data and last.strip()):
                yield lines + mark + (b"" if data else last)
            if not data:
                return


def _frames(
    where: str,
    blocks: Iterator[bytes],
    schema: Mapping[str, type[pl.DataType]],
    row: str | None = None,
) -> Iterator[pl.DataFrame]:
    """The columns of ``schema`` of each block; ``row`` is a first line of a table without names."""
    names: list[str] | None = list(schema) if schema is _PAIR else None
    before = b"" if row is None else row.encode() + b"\n"
    for block in blocks:
        if names is None:
            head, _, block = block.partition(b"\n")
            names = [name.strip() for name in head.decode("utf-8", "replace").split(",")]
            require(
                set(schema) <= set(names) and len(set(names)) >= len(names),
                f"the columns {', '.join(schema)} in {where}",
                ", ".join(names)[:120],
                error=TraceError,
            )
        types = {name: schema.get(name, pl.String) for name in names}
        try:
            frame = pl.read_csv(before + block, has_header=False, schema=types).select(*schema)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            got = (str(error).splitlines() or [""])[0][:120]
            raise TraceError(expected(f"numbers in the table of {where}", got)) from None
        require(
            not sum(frame.null_count().row(0)),
            f"a number in each field of {where}",
            "an empty one",
            error=TraceError,
        )
        before = b""
        yield frame


def _header(where: str, comments: list[str]) -> tuple[dict[str, Any], dict[int, int]]:
    """Sizes and the model's name, and bytes of one expert by layer."""
    header: dict[str, Any] = {"model": ""}
    bytes_of: dict[int, int] = {}
    for line in comments:
        values = {
            name: _HEADER[name](int(digits), f"{where}: {name}")
            for name, digits in _WHOLE.findall(line)
        }
        if "layer" in values:
            bytes_of[values.pop("layer")] = values.pop("expert_bytes", 0)
        elif named := _NAME.search(line):
            header["model"] = Path(named[1].replace("\\", "/")).name[:200]
        header |= values
    return header, bytes_of


def _turns(
    where: str, frames: Iterator[pl.DataFrame], layers: np.ndarray, slots: int
) -> Iterator[Document]:
    """A document for each turn, whose lines stand together."""
    number, held = 0, pl.DataFrame(schema=_ROUTE)
    for frame in frames:
        held = pl.concat([held, frame])
        turn = held["turn"].to_numpy()
        require(
            not (turn[1:] < turn[:-1]).any(),
            f"turns in rising order in {where}",
            "another order",
            error=TraceError,
        )
        cuts = np.flatnonzero(turn[1:] != turn[:-1]) + 1
        for start, end in zip(np.append(0, cuts[:-1]), cuts, strict=False):
            yield _turn(where, number, held[int(start) : int(end)], layers, slots)
            number += 1
        held = held[int(cuts[-1]) :] if len(cuts) else held
    if held.height:
        yield _turn(where, number, held, layers, slots)


def _turn(where: str, number: int, lines: pl.DataFrame, layers: np.ndarray, slots: int) -> Document:
    where = f"{where}, turn {lines['turn'][0]}"
    step, slot, phase, expert = (
        _bounded(where, name, lines[name].to_numpy())
        for name in ("step", "slot", "phase", "expert")
    )
    layer = lines["layer"].to_numpy()
    place = np.minimum(np.searchsorted(layers, layer), len(layers) - 1)
    first, tokens = int(step.min()), int(step.max()) - int(step.min()) + 1
    require(
        not (layers[place] != layer).any() and slot.max() < slots and phase.max() <= 1,
        f"layers of the comments, slots below {slots} and phases 0 and 1",
        "others",
        error=TraceError,
        where=where,
    )
    shape = (tokens, len(layers), slots)
    check_expansion(where, 8 * int(np.prod(shape)), LINE_BYTES * len(step))
    ids, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    at = (step - first, place, slot)
    ids[at], weights[at] = expert, lines["weight"].to_numpy()
    phases = np.full(tokens, -1)
    phases[step - first] = phase
    require(
        (ids >= 0).sum() == len(step)
        and not (phases[step - first] != phase).any()
        and phases.min() >= 0,
        "each step, layer and slot once, steps without gaps, and one phase for each step",
        "others",
        error=TraceError,
        where=where,
    )
    return Document(
        number, first, ids, weights, columns={"phase": PHASES[phases].tolist()}, where=where
    )


def _bounded(where: str, name: str, values: np.ndarray) -> np.ndarray:
    require(
        not len(values) or 0 <= values.min() <= values.max() < 2**31,
        f"{name} from 0 to {2**31 - 1}",
        "others",
        error=TraceError,
        where=where,
    )
    return values
