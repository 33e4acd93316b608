"""docs/routing.md against the code: every kind with the fields it reads, every loss, controller,
model type, and the first example.
"""

import re
from pathlib import Path

import pytest

from moe_lab.routing import FACTS, ROUTERS, ControllerKind, losses
from moe_lab.routing.hf_config import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"
if not PAGE.exists():
    pytest.skip("the documentation is not part of this installation", allow_module_level=True)
TEXT = PAGE.read_text()
TABLE = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([^|]*) \|$", TEXT, flags=re.M))


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_kind_is_listed_with_exactly_the_fields_it_reads(kind):
    assert set(re.findall(r"`(\w+)`", TABLE[kind])) == set(FACTS[kind].options)


def test_every_loss_controller_and_model_type_is_mentioned():
    for name in losses.__all__:
        if name not in ("Scale", "Scope", "CODE_BASES", "importance_of"):
            assert f"`{name}" in TEXT or f"losses.{name}" in TEXT, name
    for kind in ControllerKind:
        assert f"`{kind.value}`" in TEXT, kind
    # Where the model type is not the name of the model: DBRX's part without a type, and Step 3.7,
    # which still calls itself 3.5.
    other = {"dbrx_ffn": "dbrx", "step3p5": "step3p7", "nllb-moe": "nllb_moe"}
    for model_type in FAMILIES:
        assert (
            other.get(model_type, model_type.removesuffix("_text").removesuffix("_talker")) in TEXT
        ), model_type


def test_the_first_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    names: dict = {}
    exec(code, names)
    assert names["routing"].indices.shape == (128, 6)
    assert names["loss"].item() > 0
    assert names["router"].controller.steps == 1


def test_the_conversion_example_is_right():
    found = losses.convert_coefficient(0.001, "transformers", num_experts=128, top_k=8)
    assert found == pytest.approx(0.008)
