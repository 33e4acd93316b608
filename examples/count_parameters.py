"""Total and active parameters, and FLOPs per token, of published models and of a changed one."""

from moe_lab.accounting import count, flops

for name in ("deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B"):
    model = count(name)
    work = flops(model, context=4096, phase="prefill").total
    sparsity = 1 - model.active() / model.total
    print(f"{name}: {model.total / 1e9:.1f}B total, {model.active() / 1e9:.1f}B active,", end=" ")
    print(f"{sparsity:.1%} sparse, {work / 1e9:.0f} GFLOPs per token")

print(count("Qwen/Qwen3-30B-A3B", {"num_experts_per_tok": 4}))  # half as many experts per token
