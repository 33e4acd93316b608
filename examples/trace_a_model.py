"""Record where each token of your own torch model goes, and read the load of every layer."""

from tempfile import mkdtemp

import torch

from moe_lab import analysis
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.trace import capture, open_trace

moe = MoEConfig(d_model=32, d_expert=16, router=RouterConfig(num_experts=8, top_k=2))
config = DecoderConfig(vocab_size=50, d_model=32, num_layers=2, context_length=64, moe=moe)
model = Decoder(config).eval()  # any module with routers; here an untrained one of moe_lab

folder = mkdtemp() + "/trace"
with torch.no_grad(), capture(model, folder, losses=True):
    model(torch.randint(0, 50, (20, 60)))  # one row is one document

trace = open_trace(folder).check()
print(trace)
print(analysis.load_summary(trace).select("layer", "load_cv", "max_violation", "dead"))
