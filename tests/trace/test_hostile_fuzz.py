"""Hundreds of forged files, checksums and all: every one is read, or refused in one line, and none
ends the process.

The child process opens, checks and analyses each forgery under a memory limit; a crash, an abort, a
hang or an error of another kind is a failure. Seeds are fixed, so a failure names the forgery that
caused it.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter

MUTATIONS = 400
CHILD = """
import json, random, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
import polars as pl
from moe_lab.analysis import expert_load, repetition, router_entropy, vocabulary_specialisation
from moe_lab.errors import MoELabError
from moe_lab.trace import open_trace
from listings import relist

folder, mutations = Path(sys.argv[1]), int(sys.argv[2])
names = ["routing/layer=0/part-00000.parquet", "tokens/part-00000.parquet"]
pristine = {name: (folder / name).read_bytes() for name in names}


def heads(data):  # where columns and pages begin: zstd frames follow their headers
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD])
    return [max(at - 30, 4) for at in range(len(data) - 4) if data[at : at + 4] == frame]

outcomes = {}
for seed in range(mutations):
    random.seed(seed)
    name = names[seed % 2]
    data = bytearray(pristine[name])
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(random.choice([1, 1, 2, 4])):
        place = random.choice(["head", "head", "footer", "anywhere"])
        at = {
            "head": random.choice(heads(pristine[name])) + random.randrange(34),
            "footer": random.randrange(footer, len(data)),
            "anywhere": random.randrange(len(data)),
        }[place]
        value = random.choice([0, 1, 127, 128, 254, 255, random.randrange(256)])
        data[min(at, len(data) - 1)] = value
    if seed % 25 == 0:
        del data[random.randrange(len(data)) :]
    (folder / name).write_bytes(data)
    relist(folder, name)
    print(seed, flush=True)
    try:
        trace = open_trace(folder).check()
        for analysis in (expert_load, router_entropy, repetition, vocabulary_specialisation):
            analysis(trace)
        outcome = "read"
    except MoELabError as error:
        assert "\\n" not in str(error) and len(str(error)) < 600, error
        outcome = "refused"
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    (folder / name).write_bytes(pristine[name])
print(json.dumps(outcomes))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 tokens, top-3 of 6 + 2 with some slots unused."""
    generator = torch.Generator().manual_seed(0)
    meta = TraceMeta(layers=(LayerMeta(0, 6, 2, 3),), vocab_size=50)
    with TraceWriter(tmp_path / "t", meta) as writer:
        pos = np.arange(300)
        writer.write_tokens(
            pl.DataFrame(
                {
                    "doc": pos // 50,
                    "pos": pos % 50,
                    "token_id": pos % 50,
                    "lexer": ["name", "space"] * 150,
                }
            )
        )
        scores = torch.rand(300, 8, generator=generator)
        ids = scores.argsort(dim=1)[:, :3].masked_fill(
            torch.rand(300, 3, generator=generator) < 0.2, -1
        )
        writer.write_routing(
            0,
            pos // 50,
            pos % 50,
            Routing(ids, torch.rand(300, 3, generator=generator), scores, scores, 6, 2),
        )
    return tmp_path / "t"


@pytest.mark.slow
def test_no_forged_file_ends_the_process(folder: Path) -> None:
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(folder),
        str(MUTATIONS),
        str(Path(__file__).parents[1]),
    ]
    environment = os.environ | {"POLARS_MAX_THREADS": "2", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    lines = child.stdout.splitlines()
    assert child.returncode == 0, (
        f"forgery {lines[-1] if lines else '?'} ended the process: {child.stderr[-800:]}"
    )
    assert '"refused"' in lines[-1]
    assert len(lines) == MUTATIONS + 1
