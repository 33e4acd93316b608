import pytest
from refusals import refused
from stub_trainer import StubRun, stub_sweep

from moe_lab.files import content_hash


def test_a_sweep_needs_a_run():
    with refused("runs"):
        stub_sweep()


def test_a_run_may_be_in_a_sweep_once():
    with refused("runs"):
        stub_sweep(StubRun(name="twin"), StubRun(name="other"), StubRun(name="twin"))


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a b"])
def test_a_sweep_name_is_a_folder_name(name: str):
    with refused("name"):
        stub_sweep(StubRun(), name=name)


def test_the_hashes_of_a_sweep_are_those_of_its_runs():
    """Also where runs share parts, where equal parts are written differently (1 and 1.0), and where
    a run leaves a field out.
    """
    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig
    from moe_lab.sweeps import SweepConfig
    from moe_lab.training import OptimizerConfig, RunConfig

    whole, fraction = (
        MoEConfig(16, 8, RouterConfig(num_experts=4, top_k=2, routed_scaling_factor=scale))
        for scale in (1, 1.0)
    )
    models = [DecoderConfig(d_model=16, num_heads=2, moe=moe) for moe in (whole, fraction, whole)]
    runs = [
        RunConfig(model=model, name=f"{number} \u00e9", seed=number)
        for number, model in enumerate(models)
    ]
    runs.append(
        runs[0].replace(train_tokens=4096, budgets=(4096, 8192), optimizer=OptimizerConfig(lr=1e-3))
    )
    sweep = SweepConfig(name="s", question="?", runs=tuple(runs))
    written = [content_hash({"class": "RunConfig", **run.to_dict()}) for run in runs]
    assert list(sweep.hashes) == [run.hash() for run in runs] == written
    assert len(set(written)) == 4


def test_a_sweep_of_real_runs_survives_json():
    import json

    from moe_lab.model import DecoderConfig
    from moe_lab.sweeps import SweepConfig
    from moe_lab.training import RunConfig

    runs = tuple(RunConfig(model=DecoderConfig(d_dense=64), seed=seed) for seed in range(2))
    sweep = SweepConfig(name="s", question="?", runs=runs, preset="demo")
    back = SweepConfig.from_dict(json.loads(json.dumps(sweep.to_dict())))
    assert back == sweep
    assert back.hash() == sweep.hash()
