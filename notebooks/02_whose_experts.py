# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Whose experts are they?
#
# Every token of a Mixture-of-Experts model is sent to a few of many experts. This notebook records
# those decisions for a small model, and asks in plain steps: is the load even? which experts run
# together? do they belong to token ids, to places, to a kind of text? what is lost without one?
#
# The same works for any Mixture-of-Experts checkpoint of transformers: replace the model by yours.

# %%
import tempfile
from pathlib import Path

import polars as pl
import torch

from moe_lab.analysis import (
    coactivation,
    compare,
    domain_specialisation,
    expert_load,
    load_summary,
    repetition,
    vocabulary_specialisation,
)
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.report import figures
from moe_lab.routing import RouterConfig
from moe_lab.text import Split, TextConfig, load_tokens
from moe_lab.trace import capture, open_trace
from moe_lab.training import RunConfig, load_run, train
from moe_lab.worth import Ablation
from moe_lab.worth.worth_files import read_meta

torch.set_num_threads(1)
pl.Config(
    tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=3
)

# %% [markdown]
# ## A small model
#
# Top-2 of 8 experts in two layers, trained for a moment on this Python's own standard library. It
# says nothing about large models, but its router has begun to choose.

# %%
folder = Path(tempfile.mkdtemp())
moe = MoEConfig(d_model=32, d_expert=32, router=RouterConfig(num_experts=8, top_k=2))
config = RunConfig(
    name="notebook",
    model=DecoderConfig(
        vocab_size=512, num_layers=2, d_model=32, num_heads=1, context_length=64, moe=moe
    ),
    text=TextConfig(vocab_size=512),
    batch_size=8,
    seq_length=64,
    train_tokens=20_480,
    eval_tokens=2_000,
)
train(config, folder / "run")
model = load_run(folder / "run").model.eval()
text = load_tokens(config.text)

# %% [markdown]
# ## Record what the routers decide
#
# `capture` hooks the routers and writes every decision to a folder of Parquet. It checks as it runs
# that no slot is lost, and raises where a router was not found.

# %%
documents = [
    document.ids[:64] for document in text.documents(Split.VALIDATION) if len(document.ids) >= 64
][:120]
half = len(documents) // 2
for name, part in (("first", documents[:half]), ("second", documents[half:])):
    with torch.no_grad(), capture(model, folder / name):
        for ids in part:
            model(torch.as_tensor(ids).long()[None])
trace, other = open_trace(folder / "first"), open_trace(folder / "second")
print(f"{trace.num_tokens} tokens in {len(trace.meta.layers)} layers")

# %% [markdown]
# ## Is the load even?
#
# A load of 1 is the fair share. `max_violation` is how far the busiest expert exceeds it,
# `effective_experts` how many evenly loaded ones would be as uneven.

# %%
print(
    load_summary(trace).select(
        "layer", "slots", "load_cv", "max_violation", "gini", "effective_experts", "dead"
    )
)
heatmap = figures.expert_load(expert_load(trace))
assert load_summary(trace)["slots"].to_list() == [2 * trace.num_tokens] * 2

# %% [markdown]
# ## Which experts run together?
#
# All pairs of a token count. `lift` compares them with what the two loads alone would give: 1 means
# that the experts keep to their loads.

# %%
pairs = coactivation(trace)
print(pairs.sort("lift", descending=True, nulls_last=True).head(5))
assert (
    pairs["count"].sum() == 2 * trace.num_tokens
)  # top-2 of two layers: one pair a token and layer

# %% [markdown]
# ## Whose are they?
#
# First by token id: the mean share of an id's tokens that its top expert runs, beside `load_bound`,
# which a layer blind to the id would show. Layers that look up the input id have much more for
# `token_id` than for `true_id`, the id that follows.

# %%
kinds = [
    vocabulary_specialisation(trace, column, min_count=20).with_columns(ids_of=pl.lit(column))
    for column in ("token_id", "true_id")
]
ids = pl.concat(kinds)
print(ids)
assert (ids["token_weighted"] >= ids["load_bound"] - 1e-9).all()

# %% [markdown]
# Then by place in the document. Any column of the token table can stand here: a domain, a language,
# a class of tokens. Intervals come from resampling documents, because tokens of one document go
# together. (Band 0 is the first token, the same in every document: a lookup.)

# %%
bands = domain_specialisation(trace, "position_band", resamples=200)
print(
    bands.filter(pl.col("domain") == 0)
    .select("layer", "expert", "specialisation", "lo", "hi", "at_random")
    .head(8)
)

# %% [markdown]
# ## Do neighbours share experts?
#
# Chance is not 1/8 where loads are uneven: `chance_by_load` pairs the same tokens at random.

# %%
print(repetition(trace, resamples=200))

# %% [markdown]
# ## Two texts, or two checkpoints
#
# `compare` sets two traces side by side. Two halves of one corpus should hardly differ; where the
# texts are the same, as for two checkpoints, it also compares choice by choice, and `saturation`
# follows many checkpoints to the last.

# %%
change = compare(trace, other, resamples=200)
print(change.select("layer", "bits", "bits_lo", "bits_hi", "moved", "moved_expert"))
same = compare(trace, trace, resamples=50)
assert same["overlap"].to_list() == [1.0, 1.0]
assert float(change["bits"].to_list()[0]) < 0.2

# %% [markdown]
# ## What is each expert worth?
#
# Load says where tokens go, not what is lost without an expert. `Ablation` forbids one expert at a
# time and measures the loss of held-out documents, beside the loss with all experts. The router
# then chooses among the others. Sixteen experts and forty documents are a matter of seconds;
# `minutes` says so before.

# %%
ablation = Ablation(model, documents[:40])
print(f"about {60 * sum(ablation.minutes().values()):.0f} seconds")
tables = ablation.run(folder / "worth")
for sentence in read_meta(folder / "worth")["sentences"]:
    print(sentence)
worth = tables["worth"].sort("d_loss", descending=True)
print(worth.select("layer", "expert", "d_loss", "lo", "hi", "used").head(5))
assert worth.height == 16

# %% [markdown]
# Is the busiest expert the most needed one? Compressors remove experts by scores like these;
# `score_agreement` says how each ranks them beside the measured loss, on this model.

# %%
agreement = tables["agreement"].filter(pl.col("layer").is_null()).sort("rho", descending=True)
print(agreement.select("score", "rho", "lo", "hi"))
ranking = figures.score_agreement(agreement)

# %% [markdown]
# `moe-lab report FOLDER` draws all of this on one page, `moe-lab ablate RUN` measures the worth of
# experts. What each number may and may not say is in `docs/analysis.md` and `docs/worth.md`.
