"""The callback of transformers' Trainer: a thin use of ``monitor``."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))
from hf_capture_models import build  # type: ignore[import-not-found]  # noqa: E402

from moe_lab.errors import TraceExistsError  # noqa: E402
from moe_lab.runs.tables import read_tables  # noqa: E402
from moe_lab.training.monitoring import SCALARS  # noqa: E402
from moe_lab.training.trainer_callback import RoutingCallback  # noqa: E402

pytestmark = pytest.mark.hf


def qwen() -> Any:
    built = (build("qwen3_moe", seed)[1] for seed in range(9))
    return next(
        model for model in built if any("gate" in name for name, _ in model.named_modules())
    )


ARGUMENTS = SimpleNamespace(logging_strategy="steps")


def state_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, logging_steps=2, log_history=[{}])


def test_logged_steps_are_observed_without_padding_and_evaluation(tmp_path: Path) -> None:
    model = qwen().train()
    callback = RoutingCallback(tmp_path / "routing")
    callback.on_train_begin(ARGUMENTS, state_at(0), None, model=model)
    ids, mask = torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    seen: list[Any] = []
    for step in (1, 2):
        for _ in range(2):  # accumulation
            handles = [
                gate.register_forward_hook(lambda m, a, output: seen.append(output))
                for gate in gates
            ]
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            for handle in handles:
                handle.remove()
        model.eval()(input_ids=ids)
        model.train()
        callback.on_step_end(ARGUMENTS, state_at(step), None)
    logs: dict[str, float] = {}
    state = state_at(2)
    callback.on_log(ARGUMENTS, state, None, logs=logs)
    assert set(logs) == set(SCALARS) == set(state.log_history[0])
    callback.on_train_end(ARGUMENTS, state_at(2), None)
    later: dict[str, float] = {}
    callback.on_log(ARGUMENTS, state_at(2), None, logs=later)
    assert later == {}, "a step's scalars are logged once"
    real = mask.reshape(-1).bool()
    raw, _, chosen = seen[-len(gates)]  # the first layer in the last pass
    want = 2 * torch.bincount(chosen[real].flatten(), minlength=gates[0].num_experts)
    tables = read_tables(tmp_path / "routing")
    shares = (want / want.sum()).tolist()
    assert tables.loads["load"][0].to_list() == pytest.approx(shares, abs=1e-6)
    assert tables.layers["step"].unique().to_list() == [2]
    assert logs["moe/tokens"] == 2 * 14
    scores = raw[real].softmax(dim=1)
    entropy = float(-(scores * scores.log()).sum(dim=1).mean().detach())
    assert tables.layers["router_entropy"][0] == pytest.approx(entropy, rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_tables_of_an_earlier_training_are_kept(tmp_path: Path) -> None:
    (tmp_path / "layers.jsonl").touch()
    model = qwen()

    def begin(step: int, **options: Any) -> None:
        callback = RoutingCallback(tmp_path, **options)
        callback.on_train_begin(ARGUMENTS, state_at(step), None, model=model)
        callback.on_train_end(ARGUMENTS, state_at(step), None)

    with pytest.raises(TraceExistsError, match="got the tables of an earlier training"):
        begin(0)
    begin(5)  # goes on from a checkpoint
    begin(0, overwrite=True)


def test_the_trainer_of_transformers_calls_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    data = [
        {"input_ids": torch.randint(3, 90, (8,)), "labels": torch.randint(3, 90, (8,))}
        for _ in range(16)
    ]
    plain: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        **plain,
    )
    sent: list[dict[str, Any]] = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            sent.append(dict(logs))

    trainer = transformers.Trainer(
        model=qwen(),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Tracker()],
    )
    trainer.callback_handler.callbacks.insert(0, RoutingCallback(tmp_path / "routing"))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "moe/load_cv" in row]
    assert [row["step"] for row in logged] == [2, 4]
    assert [row["moe/tokens"] for row in logged] == [32, 32]
    assert sum("moe/load_cv" in row for row in sent) == 2
