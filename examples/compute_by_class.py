"""Which kind of text gets the compute? Real experts per token class, with intervals."""

from pathlib import Path
from tempfile import mkdtemp

from moe_lab import analysis
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.text import TextConfig
from moe_lab.trace import open_trace
from moe_lab.training import RunConfig, train

SOURCES = str(Path(__file__).resolve().parent.parent / "moe_lab")  # or a folder of your text

router = RouterConfig(kind="longcat", num_experts=8, num_zero_experts=4, top_k=3)
moe = MoEConfig(d_model=32, d_expert=32, router=router)
run = RunConfig(
    model=DecoderConfig(vocab_size=512, d_model=32, num_layers=2, context_length=64, moe=moe),
    text=TextConfig(corpus=SOURCES, vocab_size=512),
    train_tokens=20_000,
    seq_length=64,
    batch_size=8,
    eval_tokens=5_000,
)
folder = mkdtemp() + "/run"
train(run, folder)
profile = analysis.class_profile(open_trace(folder + "/trace"), "lexer")
print(profile.select("layer", "class", "n_tokens", "mean", "lo", "hi"))
