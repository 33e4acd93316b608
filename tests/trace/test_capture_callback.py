"""The callback of transformers' Trainer: few scalars, matrices in files, evaluation left out."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from hf_capture_models import build  # noqa: E402

from moe_lab.trace.capturing.callback import RoutingCallback  # noqa: E402

pytestmark = pytest.mark.hf


def qwen() -> Any:
    built = (build("qwen3_moe", seed)[1] for seed in range(9))
    return next(
        model for model in built if any("gate" in name for name, _ in model.named_modules())
    )


def test_a_step_logs_the_same_scalars_for_every_model_and_writes_the_counts(tmp_path):
    model = qwen().train()
    callback = RoutingCallback(tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)
    callback.on_train_begin(None, state, None, model=model)
    ids, mask = torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    chosen, raw = [], []
    gates: list[Any] = [
        module for name, module in model.named_modules() if name.endswith("mlp.gate")
    ]
    handle = gates[0].register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    others = [
        gate.register_forward_hook(lambda m, a, output: raw.append(output[0])) for gate in gates
    ]
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for hook in (handle, *others):
        hook.remove()
    model.eval()(input_ids=ids)  # an evaluation pass is not counted
    logs: dict[str, float] = {}
    callback.on_log(None, state, None, logs=logs)
    callback.on_train_end(None, state, None)
    slots = gates[0].top_k
    assert set(logs) == {
        *("moe/load_cv", "moe/max_violation", "moe/dead_experts", "moe/entropy"),
        *("moe/load_cv_worst", "moe/max_violation_worst", "moe/zero_share", "moe/tokens"),
    }
    real = [logits[mask.reshape(-1).bool()].softmax(dim=1) for logits in raw]
    entropies = [float(-(share * share.log()).sum(dim=1).mean()) for share in real]
    assert logs["moe/entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)  # without padding
    written = np.load(tmp_path / "counts-7.npz")
    assert int(written["tokens"]) == 14
    assert written["counts"].sum(axis=1).tolist() == [14 * slots] * len(gates)
    want = torch.bincount(
        chosen[0][mask.reshape(-1).bool()].flatten(), minlength=gates[0].num_experts
    ).double()
    assert written["counts"][0].tolist() == want.tolist()
    if len(gates) == 1:
        assert logs["moe/load_cv"] == pytest.approx(float(want.std(correction=0) / want.mean()))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_trainer_of_transformers_calls_it(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    data = [
        {"input_ids": torch.randint(3, 90, (8,)), "labels": torch.randint(3, 90, (8,))}
        for _ in range(8)
    ]
    plain: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        **plain,
    )
    trainer = transformers.Trainer(
        model=qwen(),
        args=arguments,
        train_dataset=data,
        callbacks=[RoutingCallback(tmp_path / "routing")],
    )
    trainer.train()
    assert "moe/load_cv" in trainer.state.log_history[0]
    assert int(np.load(tmp_path / "routing" / "counts-1.npz")["tokens"]) == 16
