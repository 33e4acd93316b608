"""What ``moe-lab report`` prints beside its page."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.cli import main
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, import_trace
from moe_lab.trace.rows import slot_rows
from moe_lab.training import monitor


def monitored(folder: Path) -> Path:
    """Tables of a loop that goes on: no finished run."""
    moe = MoEConfig(d_model=8, d_expert=4, router=RouterConfig(num_experts=4, top_k=2))
    model = Decoder(DecoderConfig(vocab_size=9, num_layers=1, d_model=8, num_heads=1, moe=moe))
    ids = torch.randint(0, 9, (2, 9), generator=torch.Generator().manual_seed(0))
    with monitor(model, folder, every=1) as watch:
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
        watch.step(loss=1.0)
    return folder


def counted(folder: Path) -> Path:
    np.save(folder.with_suffix(".npy"), np.array([[3, 1, 2, 2]]))
    import_trace("counts", folder.with_suffix(".npy"), folder, num_experts=4, top_k=2)
    return folder


def without_a_real_expert(folder: Path) -> Path:
    """Every token of every document chose the zero-compute experts."""
    layer = LayerMeta(0, num_experts=2, num_zero_experts=2, top_k=2)
    doc, pos = (
        np.repeat(np.arange(8, dtype=np.uint32), 5),
        np.tile(np.arange(5, dtype=np.uint32), 8),
    )
    ids = np.tile([2, 3], (40, 1))
    with TraceWriter(folder, TraceMeta((layer,), has_weights=False, has_scores=False)) as writer:
        writer.write_rows(
            0, slot_rows(layer, doc, pos, ids, None, None, None), np.array([0, 0, 40, 40])
        )
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos}))
    return folder


def without_a_token(folder: Path) -> Path:
    with TraceWriter(folder, TraceMeta((LayerMeta(0, 2, 0, 1), LayerMeta(1, 4, 0, 1)))):
        pass
    return folder


@pytest.mark.parametrize("source", [without_a_real_expert, without_a_token])
def test_a_trace_in_which_no_real_expert_ran_has_a_page_that_says_so(
    source, tmp_path, capsys
) -> None:
    folder = source(tmp_path / "trace")
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "no real expert ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "command"), [(monitored, "watch"), (counted, None)], ids=["monitored", "counted"]
)
def test_the_next_command_takes_what_was_drawn(source, command, tmp_path, capsys) -> None:
    folder = source(tmp_path / "source")
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    start = "report: " if command is None else f"next: moe-lab {command} "
    assert last.startswith(start)
