"""A trace folder is not trusted: whatever is wrong with it is one ``TraceError`` line, never a
crash and never silent numbers.
"""

import shutil

import numpy as np
import polars as pl
import pytest
import torch
from listings import edit_manifest, edit_meta, relist

from moe_lab.errors import TraceError
from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.manifest import part_name, whole_digest
from moe_lab.trace.part_files import count_slots
from moe_lab.trace.schema import VERSION_KEY
from moe_lab.trace.seal import digest

ROUTING = "routing/layer=1/part-00000.parquet"
TOKENS = "tokens/part-00000.parquet"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """200 tokens through two layers of 6 experts + 2 zero-compute ones, top-3 with some slots
    unused.
    """
    folder = tmp_path_factory.mktemp("pristine") / "t"
    generator = torch.Generator().manual_seed(0)
    layers = tuple(LayerMeta(layer, 6, 2, 3) for layer in (0, 1))
    with TraceWriter(folder, TraceMeta(layers=layers, vocab_size=50), rows_per_part=128) as writer:
        pos = np.arange(200)
        writer.write_tokens(
            pl.DataFrame(
                {"doc": pos // 50, "pos": pos % 50, "token_id": pos % 50, "lexer": ["name"] * 200}
            )
        )
        for layer in (0, 1):
            scores = torch.rand(200, 8, generator=generator)
            indices = scores.argsort(dim=1)[:, :3].masked_fill(
                torch.rand(200, 3, generator=generator) < 0.2, -1
            )
            writer.write_routing(
                layer,
                pos // 50,
                pos % 50,
                Routing(indices, torch.ones(200, 3), scores, scores, 6, 2),
            )
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "t")
    open_trace(tmp_path / "t").check()
    return tmp_path / "t"


def forge(folder, name, change, *, counts=None, version="1"):
    """Rewrite one Parquet file and make the manifest agree with it, as a forger would."""
    frame = change(pl.read_parquet(folder / name, hive_partitioning=False))
    frame.write_parquet(folder / name, metadata={VERSION_KEY: version})
    others = {} if counts is None else {"counts": counts}
    relist(folder, name, rows=frame.height, **others)


def refused(folder, message):
    with pytest.raises(TraceError, match=message) as caught:
        open_trace(folder).check()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def replace(column, values):
    """Put ``values`` (with a dtype) into the first rows of a column."""

    def change(frame):
        head = pl.Series(column, values, dtype=frame.schema[column], strict=False)
        return frame.with_columns(pl.concat([head, frame[column][len(values) :]]).alias(column))

    return change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[2, 2, 1]], "layer 1: expected"),
        ([[0, 1, 2, 3]], "layer 1: expected"),
        ([[None, 1, 2]], "layer 1: expected no null expert ids, got nulls"),
        ([None], "layer 1: expected no nulls, got nulls"),
    ],
)
def test_lists_that_do_not_fit_are_refused(folder, values, message):
    forge(folder, ROUTING, replace("experts", values))
    refused(folder, message)


@pytest.mark.parametrize("shift", [8, 65_528])
def test_expert_ids_out_of_range_are_refused(folder, shift):
    forge(
        folder,
        ROUTING,
        lambda frame: frame.with_columns(
            pl.col("experts").list.eval(pl.element() + pl.lit(shift, pl.UInt16))
        ),
    )
    refused(folder, rf"layer 1: expected expert ids between 0 and 7, got {shift + 7}")


def test_an_expert_named_twice_is_refused_even_where_the_numbers_fit(folder):
    repeat = pl.col("experts").list.eval(pl.element().first().repeat_by(pl.len()).explode())
    forge(
        folder, ROUTING, lambda frame: frame.with_columns(experts=repeat.cast(pl.List(pl.UInt16)))
    )
    refused(
        folder, "layer 1: expected each token to name an expert at most once, got a repeated id"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    forge(
        folder,
        ROUTING,
        lambda f: f.with_columns(
            pl.col("weights").list.eval(pl.element() * 0 + value).cast(pl.List(pl.Float16))
        ),
    )
    refused(folder, "layer 1: expected finite gate weights and entropies, got NaN or infinity")


@pytest.mark.parametrize(
    ("column", "kind"), [("ffn_count", "real"), ("zero_count", "zero-compute")]
)
def test_counts_that_contradict_the_ids_are_refused(folder, column, kind):
    forge(folder, ROUTING, lambda frame: frame.with_columns(pl.col(column) + 1))
    refused(folder, f"layer 1: expected {column} to be the number of {kind} expert ids, got others")


def test_negative_counts_are_refused(folder):
    forge(folder, ROUTING, lambda frame: frame.with_columns(-pl.col("ffn_count").cast(pl.Int16)))
    refused(folder, rf"{ROUTING}: expected columns doc, pos, experts")


def test_slots_that_were_removed_are_missed(folder):
    def change(frame):
        drop = pl.col("ffn_count") > 0
        cut = [
            pl.when(drop).then(pl.col(name).list.filter(pl.element() < 0)).otherwise(name)
            for name in ("experts", "weights")
        ]
        return frame.with_columns(
            *cut,
            ffn_count=pl.when(drop).then(0).otherwise("ffn_count").cast(pl.UInt8),
            zero_count=pl.when(drop).then(0).otherwise("zero_count").cast(pl.UInt8),
        )

    forge(folder, ROUTING, change)
    refused(
        folder,
        rf"{ROUTING}: expected the slots of each expert as listed in the manifest, "
        r"\d+ of expert 0, got 0; try writing the trace again",
    )


def test_tokens_that_a_layer_lacks_are_missed(folder):
    kept = count_slots(pl.read_parquet(folder / ROUTING, columns=["experts"])[5:], 8)
    forge(folder, ROUTING, lambda frame: frame[5:], counts=kept.tolist())
    refused(
        folder, "layer 1: expected the same 200 tokens as the rest of the trace, got 195 tokens"
    )


def test_keys_of_other_tokens_are_refused(folder):
    forge(folder, ROUTING, lambda frame: frame.with_columns(pl.col("doc") + 1))
    refused(
        folder,
        r"layer 1: expected the same 200 tokens as the rest of the trace, "
        r"got other \(doc, pos\) pairs",
    )


def test_tokens_counted_twice_are_refused(folder):
    for name in (TOKENS, "routing/layer=0/part-00000.parquet", ROUTING):
        forge(
            folder,
            name,
            lambda frame: frame.with_columns(pos=pl.lit(3, pl.UInt32), doc=pl.lit(0, pl.UInt32)),
        )
    refused(folder, r"expected each \(doc, pos\) once, got 12\d repeated")


def test_token_ids_outside_the_vocabulary_are_refused(folder):
    forge(folder, TOKENS, replace("token_id", [50]))
    refused(folder, "expected token ids below vocab_size 50, got 50")


def test_losses_that_are_not_finite_are_refused(folder):
    forge(folder, TOKENS, replace("loss", [float("inf")]))
    refused(folder, "expected finite losses, got NaN or infinity")


def test_another_schema_version_in_one_file_is_refused(folder):
    forge(folder, ROUTING, lambda frame: frame, version="4")
    refused(
        folder,
        rf"{ROUTING}: expected trace schema version 1, 2 or 3, got '4'; try another version",
    )


def test_token_files_of_different_columns_are_refused(folder):
    forge(folder, "tokens/part-00001.parquet", lambda frame: frame.drop("lexer"))
    refused(
        folder,
        "tokens/part-00001.parquet: expected the columns of the first token file, got others",
    )


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_truncated_file_is_refused(folder, kept):
    data = (folder / ROUTING).read_bytes()
    (folder / ROUTING).write_bytes(data[:kept])
    refused(
        folder,
        rf"{ROUTING}: expected {len(data)} bytes as written, "
        rf"got \d+ bytes \(damaged\); try writing the trace again",
    )


@pytest.mark.parametrize("name", [ROUTING, TOKENS])
def test_every_flipped_bit_is_noticed(folder, name):
    data = (folder / name).read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(data) * 8, 60):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << (at % 8)
        (folder / name).write_bytes(damaged)
        refused(folder, f"{name}: expected {len(data)} bytes as written, got another checksum")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        b"PAR1\xff\xff\xff\x7fPAR1",
        b"\x80\x04cposix\nsystem\n",
        b"<script>alert(1)</script>" * 9,
    ],
)
def test_a_file_that_is_no_parquet_is_refused(folder, content):
    (folder / ROUTING).write_bytes(content)
    relist(folder, ROUTING)
    refused(folder, f"{ROUTING}: expected readable Parquet, got .*")


def test_a_missing_file_and_an_unlisted_one_are_refused(folder):
    (folder / ROUTING).rename(folder / "routing/layer=1/part-00007.parquet")
    refused(
        folder, rf"expected \d files, got 1 missing, first {ROUTING}; try writing the trace again"
    )
    shutil.copy(folder / "routing/layer=1/part-00007.parquet", folder / ROUTING)
    refused(
        folder,
        r"expected only the files that the trace lists, "
        r"got also 'routing/layer=1/part-00007.parquet'; try removing it",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.update(schema_version=4),
            "expected trace schema version 1, 2 or 3, got 4, which a newer moe_lab wrote; "
            "try a newer version of moe_lab",
        ),
        (
            lambda v: v.update(schema_version=None),
            "version 1, 2 or 3, got None; try another version of moe_lab",
        ),
        (lambda v: v.update(schema_version=True), "expected trace schema version 1, 2 or 3"),
        (lambda v: v.update(schema_version=2), "to hold complete, parts and layers, got others"),
        (lambda v: v.update(complete="yes"), "to hold complete, manifest and layers, got others"),
        (lambda v: v.update(manifest=[1]), "to hold complete, manifest and layers, got others"),
        (lambda v: v.update(layers={"0": 1}), "to hold complete, manifest and layers, got others"),
        (lambda v: v.update(layers=[]), "expected from 1 to 4096 layers, got 0"),
        (lambda v: v.update(secret=1), "expected fields of TraceMeta .*, got secret"),
        (lambda v: v.update(model=7), "expected model .*text, got 7"),
        (lambda v: v.update(versions={"torch": 2}), "expected versions to map names to texts"),
        (
            lambda v: v.update(seed="x" * 10_000),
            "expected seed ",
        ),
        (
            lambda v: v["layers"][0].update(num_experts=10**12),
            "expected num_experts to be an integer from 1 to 65535, got 1000000000000",
        ),
        (
            lambda v: v["layers"][0].update(num_experts=-1),
            "expected num_experts to be an integer from 1 to 65535, got -1",
        ),
        (
            lambda v: v["layers"][0].update(num_experts=2.5),
            "expected num_experts .*got 2.5",
        ),
        (
            lambda v: v["layers"][0].update(num_experts=True),
            "expected num_experts .*got True",
        ),
        (lambda v: v["layers"][0].update(top_k=9), "expected top_k of at most 8"),
        (
            lambda v: v["layers"].append({"layer": 5, "num_experts": 4}),
            r"expected files for layers \[0, 1, 5\], got files for \[0, 1\]",
        ),
        (
            lambda v: v.update(layers=v["layers"][:1]),
            r"expected files for layers \[0\], got files for \[0, 1\]",
        ),
        (
            lambda v: v["manifest"].update(files=10**12),
            "expected files to be an integer from 0 to 4294967296, got 1000000000000",
        ),
        (lambda v: v["manifest"].update(files=5), "manifest: expected 5 files as meta.json says"),
        (lambda v: v["manifest"].update(parts=-1), "expected parts to be an integer from 0"),
        (lambda v: v["manifest"].update(parts=2), "part-00001.parquet: expected readable"),
        (lambda v: v["manifest"].update(digest=7), "meta.json: expected digest as text, got 7"),
        (
            lambda v: v["manifest"].update(digest="0"),
            r"manifest: expected the 1 parts that were written, got others \(damaged\)",
        ),
        (lambda _: [1, 2], "to hold an object, got list"),
    ],
)
def test_a_false_meta_file_is_refused(folder, change, message):
    edit_meta(folder, change)
    refused(folder, message)


def first_of(column, value):
    """The manifest with another value in the first row of a column, or of its counts."""
    return lambda frame: frame.with_columns(
        pl.when(
            pl.int_range(pl.len())
            == (pl.col("counts").is_not_null().arg_max() if column == "counts" else 0)
        )
        .then(pl.lit(pl.Series([value], dtype=frame.schema[column])).first())
        .otherwise(column)
        .alias(column)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_of("rows", 2**20 + 1), "manifest: expected rows from 0 to 1048576, got 1048577"),
        (first_of("rows", None), "manifest: expected rows from 0 to 1048576"),
        (first_of("rows", 127), r"part-00000.parquet: expected 127 rows as recorded, got 128"),
        (first_of("part", 10**9), "manifest: expected part from 0 to 999999999, got 1000000000"),
        (first_of("bytes", 2**60), "manifest: expected bytes from 0 to"),
        (first_of("digest", b"short"), "manifest: expected a digest of 32 bytes for each file"),
        (first_of("digest", None), "manifest: expected a digest of 32 bytes for each file"),
        (first_of("part", 1), "manifest: expected each file once, got .*part-00001.parquet twice"),
        (first_of("layer", 7), r"manifest: expected files for layers \[0, 1\], got files for"),
        (first_of("counts", None), "part-00000.parquet: expected 8 counts for each file of a"),
        (first_of("counts", [1] * 9), "part-00000.parquet: expected 8 counts for each file of a"),
        (first_of("counts", [0] * 7 + [2**31]), "manifest: expected at most 3 slots for each row"),
        (first_of("counts", [1] * 8), "routing/layer=0/part-00000.parquet: expected the slots of"),
        (lambda frame: frame.drop("counts"), "part-00000.parquet: expected readable Parquet, got"),
        (
            lambda frame: frame.with_columns(pl.lit("../../etc/passwd").alias("layer")),
            "part-00000.parquet: expected readable Parquet, got expected the documented columns",
        ),
        (lambda frame: frame[1:], "expected only the files that the trace lists, got also"),
    ],
)
def test_a_false_manifest_is_refused(folder, change, message):
    edit_manifest(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"])
def test_a_manifest_that_is_no_parquet_is_refused(folder, content):
    path = folder / part_name(0)
    path.write_bytes(content)
    refused(folder, r"manifest: expected the 1 parts that were written, got others \(damaged\)")
    edit_meta(folder, lambda values: values["manifest"].update(digest=whole_digest([digest(path)])))
    refused(folder, "manifest/part-00000.parquet: expected readable Parquet, got")
    path.unlink()
    refused(folder, "manifest/part-00000.parquet: expected readable Parquet, got No such file")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1e999', "\x00\xff"])
def test_a_meta_file_that_is_no_json_is_refused(folder, text):
    (folder / "meta.json").write_text(text, encoding="latin-1")
    refused(folder, r"expected .*meta.json to be JSON, got \w+; try writing the trace again")


def test_metadata_text_is_kept_as_it_is(folder):
    edit_meta(folder, lambda values: values.update(model="<script>alert(1)</script>"))
    assert open_trace(folder).meta.model == "<script>alert(1)</script>"


def test_a_folder_without_a_trace_is_refused(tmp_path):
    refused(
        tmp_path,
        "expected a trace at .*, "
        "got a folder without meta.json; try a folder that moe-lab trace wrote",
    )
    refused(
        tmp_path / "none",
        "expected a trace at .*none, got nothing; try a folder that moe-lab trace wrote",
    )
