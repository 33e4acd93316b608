"""Published scaling data by name: where it comes from, under which licence, with which checksum,
read into our column names.

Nothing is downloaded and nothing is shipped: files lie in ``$MOE_LAB_DATA/scaling`` (or
``$MOE_LAB_DATA``), in ``data_dir``, or where ``file`` says. Every frame keeps its original columns
and gains those of moe_lab's columns that it can fill: loss (nats/token), active_params,
total_params, tokens, ratio, compute (FLOPs), learning_rate, seed.
"""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from moe_lab.errors import AnalysisError, expected, require

ENVIRONMENT = "MOE_LAB_DATA"
CLARK_TOKENS_PER_STEP = 256 * 2048  # 250,000 steps make the paper's 130B
NO_LICENCE = "no licence file: use it, do not redistribute it"
FACTS = "numbers transcribed from the paper"
MISFIT_LOSS = "eval/ppl//fsx-onellm/data/corpora/text_only/text_eval/c4.jsonl"


@dataclass(frozen=True)
class Dataset:
    """One published data set. ``sha256`` is of the decompressed file; ``redistributable`` with
    attribution; ``read`` adds moe_lab's columns.
    """

    name: str
    file: str
    source: str
    licence: str
    redistributable: bool
    sha256: str
    read: Callable[[pl.DataFrame], pl.DataFrame]


def _clark(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        loss=pl.col("loss_validation"),
        active_params=pl.col(
            "dense_parameter_count"
        ),  # dense-equivalent, the N of the paper's fits
        total_params=pl.col("total_parameter_count"),
        ratio=pl.col("num_experts") / pl.col("k"),
        tokens=pl.col("step").cast(pl.Float64) * CLARK_TOKENS_PER_STEP,
        compute=pl.col("step") * pl.col("flops_per_step"),
    )


def _epoch(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        active_params=pl.col("Model Size"),
        compute=pl.col("Training FLOP"),
        tokens=pl.col("Training FLOP") / (6 * pl.col("Model Size")),
    )


def _gadre(frame: pl.DataFrame) -> pl.DataFrame:
    columns = {
        "loss": pl.col("loss_c4_val"),
        "active_params": pl.col("N"),
        "tokens": pl.col("D"),
        "learning_rate": pl.col("lr"),
    }
    return frame.with_columns(**columns, compute=6.0 * pl.col("N") * pl.col("D"))


def _steplaw(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        loss=pl.col("smooth loss"),
        active_params=pl.col("Na").cast(pl.Float64),
        total_params=pl.col("N").cast(pl.Float64),
        tokens=pl.col("D").cast(pl.Float64),
        ratio=pl.col("nume") / pl.col("topk"),
        learning_rate=pl.col("lr"),
        compute=6.0 * pl.col("Na") * pl.col("D"),
    )


def _misfit(frame: pl.DataFrame) -> pl.DataFrame:
    """The 51 runs of 250 steps; the others never finished.

    Two runs of a learning rate differ in the weight of the balance loss.
    """
    finished = frame.filter((pl.col("steps") == 250) & (pl.col("train/step") == 250))
    return finished.with_columns(
        loss=pl.col(MISFIT_LOSS).cast(pl.Float64).log(),
        ratio=pl.col("model.number_of_experts") / pl.col("model.moe_topk_k"),
        learning_rate=pl.col("optim.lr"),
        balance=pl.col("model.moe_load_balance"),
        tokens=pl.col("optim/n_tokens").cast(pl.Float64),
        active_params=pl.lit(1.2e7),
        seed=pl.col("torch_seed"),
    )


def _marin(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(compute=pl.col("budget_flops"), loss=pl.col("paloma_macro"))


def _kimi(frame: pl.DataFrame) -> pl.DataFrame:
    first, second = frame.columns
    return frame.with_columns(
        ratio=pl.col(first).cast(pl.Float64), compute_multiplier=pl.col(second)
    )


def _ludz_optima(frame: pl.DataFrame) -> pl.DataFrame:
    columns = {
        "compute": pl.col("F_flops"),
        "ratio": pl.col("E").cast(pl.Float64),
        "active_params": pl.col("Nact_opt"),
    }
    return frame.with_columns(**columns, tokens=pl.col("D_opt"))


def _ludz_runs(frame: pl.DataFrame) -> pl.DataFrame:
    columns = {
        "ratio": pl.col("E").cast(pl.Float64),
        "active_params": pl.col("Nact_eq10"),
        "total_params": pl.col("Ntotal_eq9"),
    }
    return frame.with_columns(**columns, tokens=pl.col("D_tokens"))


def _ling(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per model and number of experts: a design without losses."""
    experts = frame.with_columns(
        pl.col("E_list").cast(pl.String).str.split(" ").list.eval(pl.element().cast(pl.Float64))
    )
    return experts.explode("E_list").with_columns(
        ratio=pl.col("E_list") / pl.col("Ea"), learning_rate=pl.col("lr")
    )


def _tiny(frame: pl.DataFrame) -> pl.DataFrame:
    columns = {
        "loss": pl.col("val_loss"),
        "active_params": pl.col("N_nonemb").cast(pl.Float64),
        "learning_rate": pl.col("lr"),
    }
    return frame.with_columns(**columns, tokens=pl.col("D").cast(pl.Float64), ratio=pl.lit(1.0))


_CLARK = "google-deepmind/scaling_laws_for_routing@42da0c3 data/curves.csv.gz (arXiv 2202.01169)"
_LUDZ = "arXiv 2502.05172"

DATASETS: dict[str, Dataset] = {
    data.name: data
    for data in (
        Dataset(
            "clark",
            "clark_final.csv",
            f"last step of each run of {_CLARK}",
            "CC-BY-4.0",
            True,
            "9f90a1cf9c5b7fcac19f34443797f13311ef69dd58a73895ba9ef1d82b205cfc",
            _clark,
        ),
        Dataset(
            "clark_curves",
            "clark_curves.csv.gz",
            _CLARK,
            "CC-BY-4.0",
            True,
            "a93902c7cc30ff44e8aac701ee3a8ffec33be3417a85abefa88f7d4c8a50973d",
            _clark,
        ),
        Dataset(
            "epoch",
            "epoch_chinchilla.csv",
            "epoch-research/analyzing-chinchilla@9225883 data/svg_extracted_data.csv (arXiv "
            "2404.10102)",
            NO_LICENCE,
            False,
            "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
            _epoch,
        ),
        Dataset(
            "gadre",
            "gadre_104.csv",
            "mlfoundations/scaling@a003c49 exp_data/models (arXiv 2403.08540)",
            "MIT",
            True,
            "652d0d367dc984cb92cdf5f67a20a04cc69f875d4170335918ff7d40e1f5913e",
            _gadre,
        ),
        Dataset(
            "ludziejewski_optima",
            "ludz_table1_compute_optimal.csv",
            f"{_LUDZ} table 1",
            FACTS,
            True,
            "bd25378be8751ad7bef796b737135f275502f1232639502b411ccda0a6f4fdde",
            _ludz_optima,
        ),
        Dataset(
            "ludziejewski_reduced",
            "ludz_table4_reduced.csv",
            f"{_LUDZ} table 4",
            FACTS,
            True,
            "098697dae3cf107d8711a06364a10e635ef13da2481632f5c19f1306765c6d54",
            lambda frame: frame.with_columns(ratio=pl.col("E").cast(pl.Float64)),
        ),
        Dataset(
            "ludziejewski_runs",
            "ludz_runs_grid_no_loss.csv",
            f"{_LUDZ} appendix listing (no losses)",
            FACTS,
            True,
            "bd4e1fde8a0cb0fbf28e5a9f1f8668c0fb947b49001d1d4f88db71438f466ff3",
            _ludz_runs,
        ),
        Dataset(
            "ling",
            "ling_table7_activation_grid_no_loss.csv",
            "arXiv 2507.17702 table 7 (no losses)",
            FACTS,
            True,
            "bf79c1e1f6b3e126881f439b5224ece5341e563d3a266b35f401a1677c75e87b",
            _ling,
        ),
        Dataset(
            "kimi",
            "kimi_k2_sparsity_claim.csv",
            "Kimi K2 report, sparsity section",
            FACTS,
            True,
            "64bff2e00534764cd2336010c78b119ca6b143198186a38f8f22bf9dff28c8e8",
            _kimi,
        ),
        Dataset(
            "marin",
            "marin_grug_isoflop_optima.csv",
            "marin-community/marin@0433136 experiments/grug/moe/README.md",
            FACTS,
            True,
            "db23c15b524a9197022a18cbb0f8275d8a5767ad60e0f3804d3bd4ba656ef785",
            _marin,
        ),
        Dataset(
            "steplaw",
            "steplaw_moe.csv",
            "step-law/steplaw@32a8f4c data",
            NO_LICENCE,
            False,
            "653d585244a7b227423007e8b796bc16d76f6d24eb87b1919b8f048a91897b92",
            _steplaw,
        ),
        Dataset(
            "misfit",
            "misfit_gshard.csv",
            "hadasah/scaling_laws@1f3708c data (arXiv 2502.18969)",
            NO_LICENCE,
            False,
            "2c08bd7a1a3ab2af5aee15cc8e9e3e0022d9167c4fffca51a0c84774276cf163",
            _misfit,
        ),
        Dataset(
            "tiny_dense",
            "tiny_dense_wsd_transcribed.csv",
            "yigitokar/scaling-laws-as-production-functions@511cdbb "
            "data/processed/sweep/results.jsonl",
            "MIT",
            True,
            "09630f383b4e67659ced6ade37075d172e247f719346f2e3c163401965812b8f",
            _tiny,
        ),
    )
}


def published(
    name: str,
    data_dir: Path | str | None = None,
    *,
    file: Path | str | None = None,
    check: bool = True,
) -> pl.DataFrame:
    """One published data set as a frame. ``check=False`` accepts a file whose checksum is not the
    one its numbers here were made with.

    Raises ``AnalysisError`` for an unknown name, a file that is missing or not the one expected.
    """
    require(
        name in DATASETS,
        f"a data set of {', '.join(DATASETS)}",
        name,
        error=AnalysisError,
        field="name",
    )
    data = DATASETS[name]
    path = Path(file) if file is not None else _find(data, data_dir)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise AnalysisError(
            expected(
                f"a readable copy of {data.file}", f"{path}: {error}", f"a copy from {data.source}"
            ),
            field="file",
        ) from error
    found = hashlib.sha256(content).hexdigest()
    require(
        not check or found == data.sha256,
        f"{data.file} with sha256 {data.sha256[:12]}",
        found[:12],
        "check=False if you mean this version",
        error=AnalysisError,
        field="sha256",
    )
    try:
        return data.read(pl.read_csv(io.BytesIO(content), infer_schema_length=None))
    except pl.exceptions.PolarsError as error:
        raise AnalysisError(
            expected(
                f"the columns of {data.file}",
                str(error).splitlines()[0],
                f"a copy from {data.source}",
            ),
            field="columns",
        ) from error


def _find(data: Dataset, data_dir: Path | str | None) -> Path:
    folder = data_dir or os.environ.get(ENVIRONMENT)
    if not folder:
        what = f"a folder of published data in {ENVIRONMENT} or data_dir="
        raise AnalysisError(expected(what, "none", f"a copy of {data.source}"), field="data_dir")
    for path in (Path(folder) / "scaling" / data.file, Path(folder) / data.file):
        if path.is_file():
            return path
    raise AnalysisError(
        expected(
            f"{data.file} in {folder} or its folder scaling",
            "no such file",
            f"a copy from {data.source}",
        ),
        field="file",
    )


def datasets() -> pl.DataFrame:
    """The data sets that `published` can read: [name, file, source, licence, redistributable,
    sha256].
    """
    fields = ("name", "file", "source", "licence", "redistributable", "sha256")
    return pl.DataFrame(
        [{field: getattr(data, field) for field in fields} for data in DATASETS.values()]
    )
