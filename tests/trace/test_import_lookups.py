"""``route_trace v1`` and llama.cpp's CSV: what is kept, and damaged files."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from moe_lab.errors import TraceError
from moe_lab.trace import import_trace

ROWS = [
    (0, 0, 5, 0, 0, 3, 0.5, 0, 30),
    (0, 0, 5, 0, 1, 1, 0.25, 0, 30),
    (0, 0, 6, 0, 0, 2, 0.5, 0, 30),
    (0, 0, 6, 0, 1, 1, 0.25, 0, 30),
    (0, 0, 6, 1, 0, 0, 0.5, 0, 20),
    (0, 0, 6, 1, 1, 3, 0.25, 0, 20),
    (0, 1, 7, 0, 0, 2, 0.5, 1, 0),
    (0, 1, 7, 0, 1, 0, 0.25, 1, 0),
    (0, 1, 7, 1, 0, 1, 0.5, 1, 0),
    (0, 1, 7, 1, 1, 0, 0.25, 1, 0),
    (1, 1, 0, 0, 0, 2, 0.5, 1, 0),
    (1, 1, 0, 1, 0, 1, 0.5, 1, 0),
]


@pytest.fixture
def route_csv(tmp_path):
    """``write(rows, comments, gz)`` -> a file of ``route_trace v1``."""

    def write(rows, comments=None, gz=False) -> Path:
        head = comments or [
            "# route_trace v1",
            "# model=dir/m.gguf arch=x n_layer=2 n_expert=4 n_expert_used=2",
            "# layer=0 expert_bytes=30 dense_bytes=1",
            "# layer=1 expert_bytes=20 dense_bytes=1",
            "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
        ]
        text = "\n".join([*head, *(",".join(map(str, row)) for row in rows)]) + "\n"
        path = tmp_path / ("t.csv.gz" if gz else "t.csv")
        path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
        return path

    return write


@pytest.mark.parametrize("gz", [False, True])
def test_a_route_trace_keeps_slots_weights_phases_and_bytes(route_csv, tmp_path, gz, monkeypatch):
    monkeypatch.setattr("moe_lab.trace.importing.lookup_tables.BLOCK_BYTES", 100)
    trace = import_trace("route-trace", route_csv(ROWS, gz=gz), tmp_path / "out").check()
    assert [layer.expert_bytes for layer in trace.meta.layers] == [30, 20]
    assert (trace.meta.model, trace.meta.layers[0].num_experts) == ("m.gguf", 4)
    tokens = trace.tokens.collect()
    assert tokens["doc"].to_list() == [0, 0, 0, 1]
    assert tokens["pos"].to_list() == [5, 6, 7, 0]
    assert tokens["phase"].to_list() == ["prefill", "prefill", "decode", "decode"]
    assert tokens["token_id"].null_count() == 4
    routing = trace.routing.collect()
    layers = {layer: rows for (layer,), rows in routing.group_by("layer")}
    assert layers[0]["experts"].to_list() == [[3, 1], [2, 1], [2, 0], [2]]
    assert layers[1]["experts"].to_list() == [[], [0, 3], [1, 0], [1]]
    assert layers[0]["weights"].to_list()[0] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, (0, 1, 8, 0, 0, 1, 0.5, 1, 0)], "rising order"),
        (lambda rows: [rows[0], *rows], "once"),
        (lambda rows: [(0, 0, 10**6, 0, 0, 1, 0.5, 1, 0), *rows], "at most|gaps"),
        (lambda rows: [(0, 0, 5, 7, 0, 1, 0.5, 1, 0), *rows], "layers of the comments"),
        (lambda rows: [(0, 0, 5, 0, 2, 1, 0.5, 1, 0), *rows], "slots below 2"),
        (lambda rows: [(0, 0, 5, 0, 0, "x", 0.5, 1, 0), *rows], "numbers in the table"),
        (lambda rows: [(0, 0, 5, 0, 0, "", 0.5, 1, 0), *rows], "number in each field"),
        (lambda rows: [(0, 2, 5, 0, 0, 1, 0.5, 1, 0), *rows], "phases 0 and 1"),
        (lambda rows: [(0, 0, 5, 0, 0, 9, 0.5, 1, 0), *rows[1:]], "expert ids"),
        (lambda rows: [(0, 0, 5, 0, 0, -4, 0.5, 1, 0), *rows[1:]], "expert from 0"),
    ],
)
def test_damaged_route_traces_are_one_line(route_csv, tmp_path, change, message):
    with pytest.raises(TraceError, match=message):
        import_trace("route-trace", route_csv(change(ROWS)), tmp_path / "out")


def test_a_file_of_another_kind_is_refused(tmp_path, route_csv):
    for text in ("a,b\n1,2\n", "# route_trace v1\nturn,phase\n1,1\n", ""):
        path = tmp_path / "other.csv"
        path.write_text(text)
        with pytest.raises(TraceError):
            import_trace("route-trace", path, tmp_path / "out")
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"# route_trace v1\n" + b"\n" * 2**25))
    with pytest.raises(TraceError):
        import_trace("route-trace", path, tmp_path / "out")
    whole = route_csv(ROWS, gz=True).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError):
        import_trace("route-trace", path, tmp_path / "out")


@pytest.mark.parametrize("headed", [True, False])
def test_passes_of_llama_cpp_become_prompt_and_decoded_tokens(tmp_path, headed):
    prompt = [(3, 0), (3, 1), (3, 2), (3, 3), (5, 1), (5, 0)]  # layer 5 ran the last token alone
    decoded = [(3, 2), (3, 0), (5, 3), (5, 2), (3, 1), (3, 2), (5, 0), (5, 1)]
    lines = [f"{layer},{expert}" for layer, expert in prompt + decoded]
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join((["layer,expert"] if headed else []) + lines) + "\n")
    trace = import_trace("llama-cpp", path, tmp_path / "out", num_experts=4, top_k=2).check()
    tokens = trace.tokens.collect()
    assert tokens["phase"].to_list() == ["prefill", "prefill", "decode", "decode"]
    layers = {
        layer: rows["experts"].to_list()
        for (layer,), rows in trace.routing.collect().group_by("layer")
    }
    assert layers == {3: [[0, 1], [2, 3], [2, 0], [1, 2]], 5: [[], [1, 0], [3, 2], [0, 1]]}
    with pytest.raises(TraceError, match="number of slots"):
        import_trace("llama-cpp", path, tmp_path / "x", num_experts=4)
    with pytest.raises(TraceError, match="lines for each token and layer"):
        import_trace("llama-cpp", path, tmp_path / "x", num_experts=4, top_k=3)


def test_the_published_traces_keep_every_row(data_dir, tmp_path):
    source = data_dir / "serving" / "gemma4_26b_a4b.route.csv.gz"
    if not source.is_file():
        pytest.skip(f"needs the published data: no file {source}")
    trace = import_trace("route-trace", source, tmp_path / "out").check()
    assert trace.counts()["count"].sum() == 28260
    assert np.unique([layer.expert_bytes for layer in trace.meta.layers]).tolist() == [
        3593216,
        4336640,
    ]


@pytest.mark.parametrize("place", [12, 40, -30])
def test_a_damaged_gzip_file_is_refused_in_one_line(route_csv, tmp_path, place) -> None:
    path = route_csv(ROWS, gz=True)
    content = bytearray(path.read_bytes())
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(TraceError, check=lambda error: "\n" not in str(error)):
        import_trace("route-trace", path, tmp_path / "t")
