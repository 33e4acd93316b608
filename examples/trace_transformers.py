"""Record the routing of a model of Hugging Face transformers (needs ``pip install -e '.[hf]'``)."""

from tempfile import mkdtemp

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_lab import analysis
from moe_lab.trace import capture, open_trace

config = Qwen3MoeConfig(  # in place of ``from_pretrained("Qwen/Qwen3-30B-A3B")``
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
)
model = Qwen3MoeForCausalLM(config).eval()

folder = mkdtemp() + "/trace"
with torch.no_grad(), capture(model, folder):
    model(torch.randint(0, 100, (4, 50)))
trace = open_trace(folder).check()
print(trace)
print(analysis.router_entropy(trace).select("layer", "entropy", "entropy_max"))
