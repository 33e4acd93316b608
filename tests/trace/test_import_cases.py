"""Inputs of the kinds that people have, and hostile ones: a right result, or one line."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.cli import main
from moe_lab.errors import TraceError
from moe_lab.trace import import_trace, open_trace


def layers_of(trace: Any) -> list[int]:
    return [layer.layer for layer in trace.meta.layers]


@pytest.fixture
def cases(data_dir: Path) -> Path:
    return data_dir / "cases"


# ------------------------------------------------------------------------------------------------
# read


@pytest.mark.data
@pytest.mark.parametrize("name", ["routes_no_tokens.npy", "routes_with_tokens.npz"])
def test_a_configuration_that_count_reads_gives_the_sizes(cases, tmp_path, name):
    config = cases / "kimi_k2_small_config.json"
    trace = import_trace("vllm", cases / name, tmp_path / "t", config=config).check()
    assert trace.num_tokens == 100
    assert layers_of(trace) == [1, 2, 3]
    changed = {**json.loads(config.read_text()), "model_type": "deepseek_v3"}
    same = import_trace("vllm", cases / name, tmp_path / "u", config=changed).check()
    assert same.counts().equals(trace.counts())


@pytest.mark.data
def test_rows_of_zeros_of_dense_layers_are_left_out_of_counts(cases, tmp_path):
    src = cases / "sglang_dense_rows_zero.pt"
    config = cases / "deepseek_small_config.json"
    trace = import_trace("sglang", src, tmp_path / "t", config=config).check()
    assert layers_of(trace) == [1, 2, 3]
    assert trace.num_tokens == 14
    listed = import_trace("sglang", src, tmp_path / "u", top_k=2, layers=[1, 2, 3]).check()
    assert listed.counts().equals(trace.counts())
    with pytest.raises(TraceError, match="config= or layers="):
        import_trace("sglang", src, tmp_path / "v", top_k=2)


@pytest.mark.data
@pytest.mark.parametrize("name", ["vllm_server_npy_uint8.json", "dynamo_routes_object.json"])
def test_routes_in_base64_with_a_header_or_a_shape(cases, tmp_path, name):
    trace = import_trace("vllm", cases / name, tmp_path / "t", num_experts=8).check()
    assert (trace.num_tokens, len(trace.meta.layers), trace.meta.layers[0].top_k) == (7, 3, 2)
    rows = trace.routing.filter((pl.col("layer") == 0) & (pl.col("pos") == 0)).collect()
    assert rows["experts"].to_list() == [[5, 7]]
    tokens = trace.tokens.sort("pos").collect()
    assert tokens["token_id"].to_list() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert tokens["routed"].to_list() == [True] * 7 + [False]


@pytest.mark.data
def test_a_route_log_has_a_document_for_each_request(cases, tmp_path):
    trace = import_trace("vllm", cases / "vllm_route_log.jsonl", tmp_path / "t").check()
    assert (trace.meta.model, trace.meta.layers[0].num_experts) == ("some/moe", 8)
    rows = trace.routing.sort("doc", "pos").collect()
    assert rows.select("doc", "pos").rows() == [(d, p) for d in (0, 1) for p in range(4)]
    assert rows["experts"].to_list() == [[5, 7], [5, 7], [7, 3], [0, 6]] * 2
    assert rows["weights"].to_list()[0] == pytest.approx([0.6, 0.4], abs=1e-3)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("counts_float.json", [[3, 1, 2, 2], [2, 2, 2, 2]]),
        ("counts_dict_of_dicts.json", [[3, 1, 2, 2], [2, 2, 2, 2]]),
        ("counts_1layer.npy", [[3, 1, 2, 2]]),
        (
            "expert_counts.csv",
            [[2, 0, 1, 1, 1, 3, 1, 5], [0, 3, 2, 2, 3, 2, 0, 2], [3, 0, 2, 1, 0, 2, 2, 4]],
        ),
    ],
)
def test_counts_are_read_in_the_forms_that_people_have(cases, tmp_path, name, table):
    trace = import_trace("counts", cases / name, tmp_path / "t", top_k=2).check()
    assert [trace.layer_counts(layer).tolist() for layer in trace.meta.layers] == table


def written(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


ROUTES = np.array([[[0, 3], [1, 2]], [[3, 1], [0, 2]], [[2, 1], [3, 0]]])
TABLE = [[1, 2, 1, 2], [2, 1, 2, 1]]


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def response(routes: Any) -> str:
    return json.dumps([{"routed_experts": routes}])


CSV = "layer,expert,count\n" + "".join(
    f"{layer},{expert},{TABLE[layer][expert]}\n" for layer in (0, 1) for expert in range(4)
)
SAME_ROUTES = {
    "byte-order mark.json": "\ufeff" + response(ROUTES.tolist()),
    "empty lines.jsonl": "\r\n".join(
        [*(json.dumps({"routed_experts": [row]}) for row in ROUTES.tolist()), "", ""]
    ),
    "big-endian.npy": as_npy(ROUTES.astype(">i2")),
    "fortran.npy": as_npy(np.asfortranarray(ROUTES)),
    "npy in base64.json": response(
        base64.b64encode(as_npy(np.asfortranarray(ROUTES.astype(">u2")))).decode()
    ),
    "lines of base64.json": response(base64.encodebytes(as_npy(ROUTES)).decode()),
    "object.json": response(
        {
            "data": base64.b64encode(ROUTES.astype("<i2").tobytes()).decode(),
            "shape": [3, 2, 2],
            "dtype": "int16",
        }
    ),
    "counts.csv": CSV,
    "windows.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "semicolon.csv": CSV.replace(",", ";"),
    "wide.csv": CSV.encode("utf-16"),
    "header.csv": CSV.replace("layer,expert,count", '"Layer", "Expert", "Count"'),
}


@pytest.mark.parametrize("name", SAME_ROUTES)
def test_the_same_routes_in_every_form_have_the_same_counts(tmp_path, name):
    content = SAME_ROUTES[name]
    src = tmp_path / name
    src.write_bytes(content if isinstance(content, bytes) else content.encode())
    kind, sizes = ("counts", {"top_k": 2}) if src.suffix == ".csv" else ("vllm", {"num_experts": 4})
    trace = import_trace(kind, src, tmp_path / "t", **sizes).check()  # type: ignore
    assert [trace.layer_counts(layer).tolist() for layer in trace.meta.layers] == TABLE


def test_layer_keys_keep_their_numbers(tmp_path):
    table = {"layer_7": [2, 2, 0, 0], "layer_3": [1, 1, 1, 1]}
    src = written(tmp_path, "c.json", table)
    trace = import_trace("counts", src, tmp_path / "t", top_k=2).check()
    assert layers_of(trace) == [3, 7]
    assert trace.layer_counts(trace.meta.layers[1]).tolist() == [2, 2, 0, 0]
    by_domain = written(
        tmp_path, "d.json", {"a": table, "b": {"7": [1, 1, 1, 1], "3": [0, 2, 2, 0]}}
    )
    trace = import_trace("counts", by_domain, tmp_path / "u", top_k=2).check()
    assert layers_of(trace) == [3, 7]
    assert trace.layer_counts(trace.meta.layers[0]).tolist() == [1, 3, 3, 1]


@pytest.mark.data
def test_layers_with_a_gap_keep_their_numbers(data_dir, tmp_path):
    src = data_dir / "hostile" / "gap59.json"
    assert layers_of(import_trace("counts", src, tmp_path / "t", top_k=2).check()) == [5, 9]


def test_the_number_of_tokens_can_be_given_where_slots_stay_unused(tmp_path):
    """Four tokens of up to three slots: layers used 10 and 7 of them."""
    src = written(tmp_path, "c.json", [[4, 3, 2, 1], [0, 4, 3, 0]])
    with pytest.raises(TraceError, match="tokens="):
        import_trace("counts", src, tmp_path / "t", top_k=3)
    trace = import_trace("counts", src, tmp_path / "t", top_k=3, tokens=4).check()
    assert trace.num_tokens == 4
    assert [trace.layer_counts(layer).tolist() for layer in trace.meta.layers] == [
        [4, 3, 2, 1],
        [0, 4, 3, 0],
    ]
    with pytest.raises(TraceError, match="of each of 3 tokens"):
        import_trace("counts", src, tmp_path / "u", top_k=3, tokens=3)


def test_the_files_of_the_callback_are_read_with_their_layers(tmp_path):
    table = np.array([[2, 2, 0, 0], [1, 1, 1, 1]])
    np.savez(tmp_path / "counts-5.npz", counts=table, layers=np.array([4, 6]), tokens=2, step=5)
    trace = import_trace("counts", tmp_path / "counts-5.npz", tmp_path / "t", top_k=2).check()
    assert layers_of(trace) == [4, 6]
    assert trace.num_tokens == 2


def test_documents_longer_than_a_block_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_lab.trace.importing.BLOCK_SLOTS", 12)
    rng = np.random.default_rng(0)
    array = np.argsort(rng.random((7, 3, 8)), axis=2)[..., :2].astype(np.uint8)
    np.savez(tmp_path / "r.npz", routed_experts=array, token_ids=np.arange(8))
    trace = import_trace("vllm", tmp_path / "r.npz", tmp_path / "t", num_experts=8).check()
    for layer in range(3):
        rows = trace.routing.filter(pl.col("layer") == layer).sort("pos").collect()
        assert rows["experts"].to_list() == array[:, layer].tolist()
    tokens = trace.tokens.sort("pos").collect()
    assert tokens["token_id"].to_list() == list(range(8))
    assert tokens["routed"].to_list() == [True] * 7 + [False]


# ------------------------------------------------------------------------------------------------
# other types

RESPONSE = {
    "prompt_token_ids": [1, 2],
    "choices": [{"token_ids": [3, 4], "routed_experts": [[[0, 1]], [[1, 2]], [[2, 3]]]}],
}
SOUND: dict[str, tuple[str, Any]] = {
    "vllm": ("s.json", RESPONSE),
    "trtllm": (
        "s.json",
        [{"prompt_ids": [1], "outputs": [{"output_ids": [2], "expert_ids": [[[0, 1]]]}]}],
    ),
    "sglang": (
        "s.json",
        {
            "input_ids": [1],
            "output_ids": [2],
            "meta_info": {"routed_experts": {"data": "AAE=", "shape": [1, 1, 2], "dtype": "uint8"}},
        },
    ),
    "megatron": (
        "router_trace_rank0.jsonl",
        {"step": 0, "layer": 1, "num_tokens": 1, "topk": 2, "top_indices": [[0, 1]]},
    ),
    "moe-atlas": (
        "s.json",
        {
            "model_id": "m",
            "num_layers": 1,
            "num_experts": 4,
            "top_k": 1,
            "token_ids": [5],
            "activations": [{"layer": 0, "token_idx": 0, "expert_idx": 3, "gate_weight": 1.0}],
        },
    ),
    "stratamoe": (
        "s.json",
        {
            "version": 2,
            "expertsPerLayer": 4,
            "topK": 2,
            "layers": 1,
            "tokens": 1,
            "selections": [[[0, 1]]],
            "scenario": "s",
            "seed": 1,
            "source": {"model": {"id": "m"}, "workload": {"sha256": "0"}, "software": {"v": "1"}},
        },
    ),
    "counts": ("s.json", {"m": {"expert_counts": {"d": {"layer_0": [1, 1, 0, 0]}}}}),
}
OTHER_TYPES = [
    None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", [], [[]], [None], {}, {"0": 1}, [["a"]], [[[0]]]
]  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """``value`` with one of its nodes of another type, or without one of its fields."""
    yield from OTHER_TYPES
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from ({**value, key: other} for other in variants(value[key]))
    if isinstance(value, list):
        for place in range(len(value)):
            yield from ([*value[:place], o, *value[place + 1 :]] for o in variants(value[place]))


@pytest.mark.parametrize("kind", SOUND)
def test_a_value_of_another_type_is_read_or_refused(tmp_path, kind):
    name, sound = SOUND[kind]
    options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "model": "m"}
    if kind == "moe-atlas":
        options |= {"top_k": 1}
    import_trace(kind, written(tmp_path, name, sound), tmp_path / "sound", **options).check()
    refusals = []
    for number, value in enumerate(variants(sound)):
        try:
            import_trace(kind, written(tmp_path, name, value), tmp_path / f"t{number}", **options)
        except TraceError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all(len(message.splitlines()) == 1 for message in refusals)


# ------------------------------------------------------------------------------------------------
# refused in one line


def refused(capsys: Any, *arguments: str) -> str:
    assert main(["trace", "--import", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) < 1000
    return lines[0]


@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("counts", "counts_topk_string.json"),
        ("counts", "counts_expert_counts_list.json"),
        ("counts", "counts_expert_counts_null.json"),
        ("sglang", "sglang_meta_info_string.json"),
        ("vllm", "vllm_token_ids_number.json"),
        ("stratamoe", "stratamoe_software_string.json"),
    ],
)
def test_a_wrong_type_is_one_line_that_names_the_file(cases, tmp_path, capsys, kind, name):
    sizes = ["--num-experts", "4", "--model", "m"]
    line = refused(capsys, kind, str(cases / name), "--out", str(tmp_path / "t"), *sizes)
    assert name in line
    assert not (tmp_path / "t").exists()


@pytest.mark.data
def test_rows_of_a_prompt_that_were_not_recorded_name_file_and_record(cases, tmp_path, capsys):
    src = cases / "vllm_zero_prompt_rows.json"
    out = ["--out", str(tmp_path / "t"), "--num-experts", "8"]
    line = refused(capsys, "vllm", str(src), *out)
    assert "vllm_zero_prompt_rows.json, record 1" in line


@pytest.mark.data
@pytest.mark.parametrize("name", ["dup0.json", "dd.json"])
def test_duplicate_and_mixed_layers_are_refused(data_dir, tmp_path, capsys, name):
    src = str(data_dir / "hostile" / name)
    assert name in refused(capsys, "counts", src, "--out", str(tmp_path / "t"), "--top-k", "2")


@pytest.mark.data
@pytest.mark.parametrize("name", ["brackets.npy", "huge_shape.npy", "enc.npz", "m99.npz"])
def test_hostile_arrays_are_refused(data_dir, tmp_path, capsys, name):
    src = str(data_dir / "hostile" / name)
    out = ["--out", str(tmp_path / "t"), "--num-experts", "8"]
    assert name in refused(capsys, "vllm", src, *out)


HUGE = 10**9


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("c.json", {"counts": [[HUGE, HUGE]], "top_k": 2}, "rows \\(tokens x layers\\)"),
        ("c.json", [[0, 1, 2, 3], [3, 1, 2, 0]], "expected counts, got the ranks"),
        ("c.json", {"counts": [[2, 2]], "top_k": 300}, "top_k as a whole number from 1 to 255"),
        ("c.json", '{"0": [2, 2], "0": [2, 2]}', "each key of an object once"),
        ("c.json", "[" * 100_000, "nested too deep"),
        ("c.json", f"[[{'9' * 5000}, 1]]", "digits"),
        ("c.csv", "layer,expert,count\n0,0,2\n0,0,2\n", "line 3"),
        ("c.csv", "layer|expert|count\n0|0|2\n", "line 2"),
        ("c.csv", "layer,expert,count\n0,99999999,2\n", "line 2"),
        ("c.json", [[0, 0], [0, 0]], "at least one token"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_rows_are_made(tmp_path, name, value, message):
    src = written(tmp_path, name, value)
    with pytest.raises(TraceError, match=message):
        import_trace("counts", src, tmp_path / "t", top_k=2)
    assert not (tmp_path / "t").exists()


def test_the_largest_unsigned_id_is_not_an_unused_slot(tmp_path):
    np.save(tmp_path / "r.npy", np.full((2, 1, 1), 2**64 - 1, np.uint64))
    with pytest.raises(TraceError, match="expected ids between -1 and"):
        import_trace("vllm", tmp_path / "r.npy", tmp_path / "t", num_experts=4)


def test_an_archive_that_expands_beyond_all_measure_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", routed_experts=np.zeros((2**21, 4, 2), np.int32))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**17
    with pytest.raises(TraceError, match=r"bytes in bomb\.npz"):
        import_trace("vllm", tmp_path / "bomb.npz", tmp_path / "t", num_experts=4)


def test_a_tensor_of_repeated_strides_is_refused(tmp_path):
    counts = torch.zeros(1, dtype=torch.int64).expand(10**6, 10**4)
    torch.save({"logical_count": counts}, tmp_path / "stride.pt")
    with pytest.raises(TraceError, match=r"bytes in logical_count of stride.pt"):
        import_trace("sglang", tmp_path / "stride.pt", tmp_path / "t", top_k=2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 0},
        {"top_k": 2.5},
        {"layers": []},
        {"layers": [1, 1]},
        {"tokens": -1},
        {"num_experts": 10**9},
    ],
)
def test_sizes_that_no_model_has_are_refused(tmp_path, options):
    src = written(tmp_path, "c.json", [[2, 2]])
    with pytest.raises(TraceError, match=next(iter(options))):
        import_trace("counts", src, tmp_path / "t", **{"top_k": 2, **options})


def test_a_large_honest_array_is_imported_within_a_gigabyte(tmp_path):
    """120 MB of routes: mapped, and turned into rows in blocks."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 4, (5 * 10**5, 4, 2), dtype=np.int32) * 2 + np.arange(2, dtype=np.int32)
    np.save(tmp_path / "r.npy", array)
    code = f"""
from pathlib import Path
from moe_lab.trace import import_trace
folder = {str(tmp_path)!r}
trace = import_trace("vllm", folder + "/r.npy", folder + "/t", num_experts=8)
assert trace.num_tokens == {len(array)}
# ru_maxrss would begin with the memory of the process that started this one.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20  # kB
    assert open_trace(tmp_path / "t").meta.layers[3].num_experts == 8


@pytest.mark.parametrize(
    "counts",
    [
        torch.zeros(3, 2, 0, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.eye(4, dtype=torch.int64).to_sparse(),
        torch.ones(2, 4, dtype=torch.bfloat16),
        torch.ones(2, 4, dtype=torch.complex64),
        torch.ones(2, 4, dtype=torch.int64, device="meta"),
    ],
    ids=["no experts", "no layers", "sparse", "bfloat16", "complex", "meta"],
)
def test_recorded_counts_of_other_shapes_and_types_are_refused(tmp_path, counts):
    torch.save({"logical_count": counts}, tmp_path / "counts.pt")
    with pytest.raises(TraceError, match=r"expected .* in|counts.pt: expected integers"):
        import_trace("sglang", tmp_path / "counts.pt", tmp_path / "t", top_k=2)
    assert not (tmp_path / "t").exists()
