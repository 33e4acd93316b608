"""Interventions on every transformers family that ``capture`` reads: each edit against a model
whose parameters say the same.
"""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))

from moe_lab.errors import TraceError  # noqa: E402
from moe_lab.trace import capture, open_trace  # noqa: E402
from moe_lab.trace.capturing.find_routers import find_sites  # noqa: E402
from moe_lab.trace.capturing.traced_router import TracedRouter  # noqa: E402
from moe_lab.worth import Ablation, Exchange, Forbid, Replay, Silence, TopK, intervene  # noqa: E402

_captures: Any = importlib.import_module("test_capture_families")
FAMILIES, ran, with_routers = _captures.FAMILIES, _captures.ran, _captures.with_routers

pytestmark = pytest.mark.hf

REFUSED = ("doge", "nllb_moe")
BY_TABLE = "deepseek_v4"
"""Its first layers select by token id."""
FLOAT32 = ("inkling2", "inkling2_loop", "granitemoe_swa")
"""Their routers take no float64, or their attention gives NaN in it."""
NO_TOP_K_CALL = ("phimoe", "switch_transformers")
"""Their routers take maxima one after the other, which no recorded selection can stand in for."""
SIZES = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
    *("total_experts", "moe_num_experts"),
)


class Family:
    """A tiny model of a family, in float64 where it takes that; its last router, and the expert
    that this one uses most.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.config, self.model, _ = with_routers(name)
        self.double = name not in FLOAT32
        self.model = self.model.double() if self.double else self.model
        for parameter in self.model.parameters():  # some classes leave memory as it was
            parameter.data = parameter.data.nan_to_num(0, 0, 0).clamp(-3, 3)
        for module in self.model.modules():
            if hasattr(module, "config"):  # grouped products have no float64
                module.config._experts_implementation = "eager"  # type: ignore[union-attr]
            if hasattr(module, "num_group"):  # a group of fewer experts is no group of the family
                module.num_group = module.topk_group = 1  # type: ignore[assignment]
        ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(7))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        self.only = None
        if self.config.is_encoder_decoder:
            self.inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
            self.only = "decoder"
        with torch.no_grad(), capture(self.model, folder, only=self.only):
            self.untouched = self.run(self.model)
        self.trace = open_trace(folder)
        self.site = self.sites(self.model)[-1]
        layer = next(layer for layer in self.trace.meta.layers if layer.module == self.site.name)
        counts = self.trace.layer_counts(layer)[: layer.num_experts]
        self.layer = self.site.layer
        self.used, self.other = (int(expert) for expert in (-counts).argsort()[[0, 1]])

    def sites(self, model: nn.Module) -> list[TracedRouter]:
        return find_sites(model, None, self.only)[0]

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        output = model(**self.inputs)
        return output[0] if "logits" not in output else output.logits

    def edited(self, *edits: Any, model: nn.Module | None = None) -> Tensor:
        with intervene(model or self.model, *edits, only=self.only):
            return self.run(model or self.model)

    def copied(self) -> tuple[nn.Module, list[tuple[nn.Module, str, Tensor]]]:
        """A copy of the model, and (module, name, [E, ...] rows) of the experts of its layer."""
        model = copy.deepcopy(self.model)
        block = self.block(model)
        rows = []
        for path, module in block.named_modules():
            router = module is self.sites(model)[-1].module or path.startswith(("gate", "router"))
            inside = path.startswith("experts") or not hasattr(block, "experts")
            if router or not inside:
                continue
            for name, value in module.named_parameters(recurse=False):
                sizes = (self.site.num_choices, self.site.num_experts)
                number = next((size for size in sizes if value.shape[0] % (size or 1) == 0), None)
                if value.dim() > 1 and number is not None:
                    rows.append((module, name, value.data.view(number, -1)))
        return model, rows

    def block(self, model: nn.Module) -> Any:
        return model.get_submodule(self.site.name.rpartition(".")[0])


def named(name: str) -> bool:
    return ran(name) and name not in (*REFUSED, BY_TABLE)


@pytest.mark.parametrize("name", [name for name in FAMILIES if named(name)])
def test_each_edit_is_what_the_parameters_would_make_of_it(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "t")
    layer, used, other = family.layer, family.used, family.other
    silenced = family.edited(Silence(layer, used))
    assert not torch.equal(silenced, family.untouched)
    zeroed = with_zero_expert(family)
    near, least = (1e-9, 1e-12) if family.double else (1e-4, 1e-6)
    torch.testing.assert_close(silenced, family.run(zeroed), rtol=near, atol=least)
    forbidden = family.edited(Forbid(layer, used))
    if deleted := without_expert(family):
        # Routers that compute in float32 are equal to its precision only.
        torch.testing.assert_close(forbidden, family.run(deleted), rtol=1e-4, atol=1e-6)
    assert not torch.equal(forbidden, family.untouched)
    doubled = with_copied_expert(family)
    before = family.run(doubled)
    after = family.edited(Exchange(layer, used, other), model=doubled)
    # Experts run in the order of their ids: a sum of two has one order, one of three has several,
    # and openai_privacy_filter adds them up in float32.
    exact = (family.site.top_k or 0) <= 2
    torch.testing.assert_close(after, before, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert not torch.equal(family.edited(Exchange(layer, used, other)), family.untouched)
    if name in NO_TOP_K_CALL:
        with pytest.raises(TraceError, match=type(family.site.module).__name__):
            family.edited(Replay(family.trace))
    else:
        replayed = family.edited(Replay(family.trace))
        assert torch.equal(replayed, family.untouched)
    assert torch.equal(family.run(family.model), family.untouched)
    assert "forward" not in vars(family.site.module)


@pytest.mark.parametrize("name", [name for name in FAMILIES if named(name)])
def test_the_number_of_slots_is_the_routers_own(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "t")
    slots, site = family.site.top_k, family.site
    assert slots is not None
    assert site.num_experts is not None
    more = slots + 1
    if name in (*NO_TOP_K_CALL, "jetmoe"):  # the last router of JetMoE is of an attention
        with pytest.raises(TraceError, match=site.name):
            family.edited(TopK(family.layer, more))
        return
    if more > site.num_experts:
        pytest.skip("no further expert")
    wider = copy.deepcopy(family.model)
    module = family.sites(wider)[-1].module
    holder = (
        next(item for item in (module, family.block(wider)) if hasattr(item, "top_k"))
        if not hasattr(module, "per_expert_scale")
        else None
    )
    if holder is not None:
        holder.top_k = more  # type: ignore[assignment]
        assert torch.equal(family.edited(TopK(family.layer, more)), family.run(wider))
    assert not torch.equal(family.edited(TopK(family.layer, more)), family.untouched)
    assert torch.equal(family.run(family.model), family.untouched)


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "llama4", "dbrx", "jetmoe", "olmoe"],
)
def test_the_gradient_of_a_replay_reaches_the_weights_only(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "t")
    parameter: Any = getattr(family.site.module, "weight", None)
    if parameter is None:
        parameter = next(family.site.module.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(parameter.shape, generator=generator).double()

    def output(step: float) -> Tensor:
        parameter.data += step * direction
        with intervene(family.model, Replay(family.trace), only=family.only):
            value = family.model(**family.inputs).logits.square().sum()
        parameter.data -= step * direction
        return value

    output(0).backward()
    slope = (parameter.grad * direction).sum()
    # Most routers take their softmax in float32.
    numeric = (output(3e-3) - output(-3e-3)) / 6e-3
    torch.testing.assert_close(numeric.detach(), slope, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "gemma4"])
def test_slots_of_some_tokens_are_those_of_all_at_their_places(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "t")
    model, slots = family.model, family.site.top_k
    assert slots is not None
    named = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    for k in {max(slots - 1, 1), slots + 1}:
        every = family.edited(TopK(family.layer, k))
        some = family.edited(TopK(family.layer, k, named))
        assert torch.allclose(some[named], every[named], atol=1e-9, equal_nan=True)
        assert torch.allclose(some[~named], family.untouched[~named], atol=1e-9, equal_nan=True)
    assert torch.equal(family.run(model), family.untouched)


def test_longcat_needs_two_slots(tmp_path: Path) -> None:
    family = Family("longcat_flash", tmp_path / "t")
    with refused("k", TraceError):
        family.edited(TopK(family.layer, 1))
    assert Ablation(family.model, []).ks[0] == 2


@pytest.mark.parametrize("name", ["llama4", "dbrx", "jetmoe"])
def test_routers_without_slots_of_single_tokens_are_named(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "t")
    with refused("tokens", TraceError):
        family.edited(TopK(family.layer, 2, torch.ones(2, 12, dtype=torch.bool)))


@pytest.mark.parametrize("name", REFUSED)
def test_routers_that_cannot_be_edited_are_named(name: str) -> None:
    _, model, _ = with_routers(name)
    only = "decoder" if model.config.is_encoder_decoder else None  # type: ignore[union-attr]
    site = find_sites(model, None, only)[0][0]
    with refused(site.name, TraceError), intervene(model, Silence(site.layer, 0), only=only):
        pass


def test_a_table_of_token_ids_can_be_silenced_but_not_told_to_forget_an_expert() -> None:
    _, model, _ = with_routers(BY_TABLE)
    sites = find_sites(model, None, None)[0]
    site = next(site for site in sites if "Hash" in type(site.module).__name__)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(7))
    untouched = model(input_ids=ids).logits
    with intervene(model, Silence(site.layer, 0)):
        assert not torch.equal(model(input_ids=ids).logits, untouched)
    for edits in ([Forbid(site.layer, expert) for expert in range(3)], [TopK(site.layer, 3)]):
        with pytest.raises(TraceError, match=site.name), intervene(model, *edits):
            model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, untouched)
    assert "forward" not in vars(site.module)


def single_experts(family: Family, model: nn.Module) -> list[nn.Module]:
    """The most used expert and another, where each is a module; else nothing."""
    children = dict(family.block(model).named_modules())
    names = [f"experts.expert_{expert}" for expert in (family.used, family.other)]
    return [children[name] for name in names if name in children]


def with_zero_expert(family: Family) -> nn.Module:
    model, rows = family.copied()
    if single := single_experts(family, model):
        for value in single[0].parameters():
            value.data.zero_()
        return model
    assert rows
    for _, _, values in rows:
        values[family.used] = 0
    for module in family.block(model).modules():
        for name, value in module.named_parameters(recurse=False):
            if "bias" in name and value.dim() == 2 and len(value) == family.site.num_experts:
                value.data[family.used] = 0
    return model


def with_copied_expert(family: Family) -> nn.Module:
    model, rows = family.copied()
    if single := single_experts(family, model):
        single[1].load_state_dict(single[0].state_dict())
        return model
    for _, _, values in rows:
        values[family.other] = values[family.used]
    return model


def without_expert(family: Family) -> nn.Module | None:
    """The model without the rows of the most used expert; None where experts are modules with
    numbered names, or their number is the whole model's.
    """
    model, rows = family.copied()
    if type(family.site.module).__name__ == "ZayaRouter" or single_experts(family, model):
        return None
    experts, choices = family.site.num_experts, family.site.num_choices
    assert experts is not None
    assert choices is not None
    for module, name, values in rows:
        old = getattr(module, name)
        keep = [expert for expert in range(len(values)) if expert != family.used]
        shape = (len(keep) * old.shape[0] // len(values), *old.shape[1:])
        setattr(module, name, nn.Parameter(values[keep].reshape(shape)))
    block, site = family.block(model), family.sites(model)[-1]
    shared = (
        getattr(site.module, "n_shared_experts", 0) if hasattr(site.module, "global_scale") else 0
    )
    for module in block.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in list(tensors.items()):
                if value is None or any(module is row[0] and name == row[1] for row in rows):
                    continue
                for width in {choices, choices + shared}:
                    for axis in range(min(value.dim(), 2)):
                        named = "bias" in name or axis == 0
                        if value.shape[axis] == width and named and tensors.get(name) is value:
                            left = [e for e in range(width) if e != family.used]
                            data = value.data.index_select(axis, torch.tensor(left))
                            same = isinstance(value, nn.Parameter)
                            tensors[name] = nn.Parameter(data, False) if same else data
    around = model.get_submodule(family.site.name.rsplit(".", 2)[0])
    for module in (*block.modules(), around):
        for size in SIZES:
            if getattr(module, size, None) in (experts, choices):
                setattr(module, size, getattr(module, size) - 1)
    return model
