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
# # Where should experts live?
#
# A trace says which experts each token used. From it follows what to keep in memory, on which
# device to place each expert, and what a decoding step reads. A small model is trained here on the
# source of Python's standard library, traced on files that it never saw, and asked those questions.
# Each answer is judged on text that it was not chosen on.

# %%
import tempfile
from pathlib import Path

import polars as pl
import torch

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.serving import (
    coverage,
    distinct_experts,
    expert_cache,
    fit_workload,
    placement_sentence,
    placement_transfer,
    prefetch,
    speculation,
    tokens_needed,
    workload_agreement,
)
from moe_lab.serving.sentences import cache_sentences, decode_sentence, speculation_sentence
from moe_lab.text import Split, TextConfig, load_tokens
from moe_lab.trace import capture, open_trace
from moe_lab.training import RunConfig, load_run, train

torch.set_num_threads(1)
pl.Config(
    tbl_cols=-1,
    tbl_hide_dataframe_shape=True,
    tbl_hide_column_data_types=True,
    float_precision=3,
    fmt_str_lengths=60,
)

# %% [markdown]
# ## A model and its trace

# %%
folder = Path(tempfile.mkdtemp())
moe = MoEConfig(d_model=32, d_expert=16, router=RouterConfig(num_experts=32, top_k=4))
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
run = load_run(folder / "run")
text = load_tokens(config.text)
unseen = [*text.documents(Split.VALIDATION), *text.documents(Split.REFERENCE)][:60]
with torch.no_grad(), capture(run.model.eval(), folder / "trace"):
    for document in unseen:
        run.model(torch.tensor(document.ids[:64]).long()[None])
trace = open_trace(folder / "trace")
print(f"{trace.num_tokens:,} tokens of {len(unseen)} documents")

# %% [markdown]
# ## What to keep in memory
#
# The cache holds experts of all layers within a budget. `static` keeps the experts that *other*
# documents used most; `clairvoyant` knows the future, so no rule that only looks back does better.

# %%
cache = expert_cache(trace, config=config.model, resamples=200)
print(cache.filter(phase="decode").pivot("policy", index="budget", values="hit_rate"))
print("\n".join(cache_sentences(cache)))

# %% [markdown]
# Does it help to guess the next experts beforehand? Only as far as a guess beats the static list.

# %%
print(prefetch(trace, resamples=200).filter(pl.col("layer").is_null()).drop("layer", "note"))

# %% [markdown]
# ## Where to place experts
#
# Chosen on half of the documents, judged on the other half. `in_sample` is what a tool that judges
# on its own text would report.

# %%
transfer = placement_transfer(trace, devices=8, slots=40, resamples=200)
print(transfer.select("imbalance", "lo", "hi", "in_sample", "contiguous", "bound", "beats"))
print(placement_sentence(transfer))
print(tokens_needed(trace, devices=8, slots=40, repeats=10))

# %% [markdown]
# ## What decoding reads
#
# A window of tokens in a row repeats experts; capacity plans that assume equal loads do not see it.

# %%
touched = distinct_experts(trace, batch=[4, 16], window=[4, 16], resamples=200)
print(touched.filter(pl.col("layer").is_null()).drop("layer", "note"))
print(decode_sentence(touched))
print(speculation_sentence(speculation(trace, [4], config=config.model)))

# %% [markdown]
# ## Which experts matter, and a workload that stands for this one

# %%
print(coverage(trace, [0.5, 0.9], resamples=200).drop("experts", "note"))
sample = fit_workload(trace).sample(folder / "sample", trace.num_tokens, seed=1)
print(workload_agreement(trace, sample, resamples=100))

# %% [markdown]
# The sample may stand for the trace in the questions where `agrees` is true, and in no other.
