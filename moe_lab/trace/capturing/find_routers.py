"""Which modules of a model route, how each is read, and how many experts and slots it has by its
configuration.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_lab.errors import MoELabError, TraceError, expected
from moe_lab.routing import Router, RouterConfig
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.capturing.hf_router_outputs import SPECIAL, Special
from moe_lab.trace.capturing.router_output import Reader, Seen, triple

ROUTER_CLASS = re.compile(r"(Router|Gate|Gating)$")
BANK_CLASS = re.compile(r"(?<!Shared)(Experts|ExpertBank)$")
NOT_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech_encoder)")
"""Parts of a multimodal model whose tokens are not those of the text."""

EXPERT_NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
SLOT_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass
class Site:
    """One router of a model.

    Attributes:
        name: of the hooked module.
        module: the module whose calls are read.
        read: makes a reading of what the hooks saw.
        layer: number in the trace.
        taps: label -> module whose inputs and outputs are seen too.
        num_experts, top_k: from the configuration; None where it does not tell, so that the first
            call does.
        score_func: from logits to scores; None where it must be inferred from the weights.
    """

    name: str
    module: nn.Module
    read: Reader
    layer: int
    taps: dict[str, nn.Module]
    num_experts: int | None = None
    top_k: int | None = None
    num_zero_experts: int = 0
    zero_kinds: tuple[str, ...] = ()
    score_func: ScoreFunc | None = None

    @property
    def num_choices(self) -> int | None:
        """Real and zero-compute experts together."""
        return None if self.num_experts is None else self.num_experts + self.num_zero_experts


def find_sites(
    model: nn.Module, readers: Mapping[str, Reader] | None, only: str | None
) -> tuple[list[Site], list[str]]:
    """The routers of ``model`` in the order of its modules, and the names of those left out because
    they do not see the text.

    Args:
        readers: module name, or a pattern that matches it whole -> reader; they go before what is
            known.
        only: a regular expression that a router's name must contain.

    Raises:
        TraceError: no router; an expert bank without one; a reader for a module that is not there;
            the routers of an encoder and a decoder at once, whose tokens are not the same.
    """
    named = dict(model.named_modules())
    found: dict[str, Site] = {}
    for pattern, read in (readers or {}).items():
        names = [name for name in named if re.fullmatch(pattern, name)]
        if not names:
            raise TraceError(
                expected(
                    f"a module named {pattern!r}", "none", f"a name among {_some(list(named))}"
                )
            )
        for name in names:
            found[name] = _custom(name, named, read)
    config, recorded = _text_config(model), _recorded_classes(model)
    for name, module in named.items():
        if (
            name not in found
            and (site := _known(name, module, named, config, recorded)) is not None
        ):
            found[name] = site
    for name in [name for name in found if _inside(name, found)]:
        del found[name]
    left_out = [name for name in found if NOT_TEXT.search(name) and name not in (readers or {})]
    sites = [
        found[name]
        for name in named
        if name in found and name not in left_out and re.search(only or "", name)
    ]
    if not sites:
        raise TraceError(
            expected(
                "a model with routers",
                f"{type(model).__name__} without any that is known",
                _hint(named),
            )
        )
    _check_banks(named, sites, left_out, only)
    stacks = {
        part
        for site in sites
        for part in ("encoder", "decoder")
        if re.search(rf"(^|\.){part}\.", site.name)
    }
    if len(stacks) == 2:
        raise TraceError(
            expected(
                "the routers of one stack, whose tokens are the same",
                "encoder and decoder",
                "only='decoder' or 'encoder'",
            )
        )
    _number(sites)
    return sites, left_out


def paths_above(name: str) -> Iterator[str]:
    """The names of the modules around ``name``, the closest first, the whole model ("") last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _known(
    name: str, module: nn.Module, named: Mapping[str, nn.Module], config: Any, recorded: set[type]
) -> Site | None:
    if isinstance(module, Router):
        settings, reader = module.config, _own
        kinds = (
            tuple(kind.value for kind in settings.zero_kinds) if settings.num_zero_experts else ()
        )
        sizes = (settings.num_experts, settings.num_slots, settings.num_zero_experts)
        return Site(name, module, reader, 0, {}, *sizes, kinds, settings.scored_by)
    special = SPECIAL.get(type(module).__name__)
    if special is None:
        if type(module) not in recorded and not (
            ROUTER_CLASS.search(type(module).__name__) and "experts" in _beside(name, named)
        ):
            return None
        special = Special("a triple")
    return _library(name, module, special, named, config)


def _own(module: nn.Module, seen: Seen) -> Any:
    return seen["output"]


def _library(
    name: str, module: nn.Module, special: Special, named: Mapping[str, nn.Module], config: Any
) -> Site:
    block = module if special.block else named.get(name.rpartition(".")[0], module)
    wanted = special.taps or (("experts",) if special.read is triple else ())
    taps = {
        child: getattr(block, child)
        for child in wanted
        if isinstance(getattr(block, child, None), nn.Module)
    }
    own = getattr(module, "config", None)
    experts = (
        special.experts(module)
        if special.experts
        else _first_integer(EXPERT_NAMES, module, own, config)
    )
    slots = (
        special.slots(module)
        if special.slots
        else _first_integer(SLOT_NAMES, module, own, getattr(config, "ffn_config", None), config)
    )
    zero = special.zero_experts(module) if special.zero_experts else 0
    return Site(
        name,
        module,
        special.read,
        0,
        taps,
        experts,
        slots,
        zero,
        (special.zero_kind,) * zero if special.zero_kind else (),
        special.score_func or _score_by_family(config, _number_in(name)),
    )


def _custom(name: str, named: Mapping[str, nn.Module], read: Reader) -> Site:
    """A module of the user's: the experts beside it are seen too, and sizes are read where it has
    them.
    """
    module = named[name]
    beside = _beside(name, named)
    taps = {"experts": beside["experts"]} if "experts" in beside else {}
    return Site(
        name,
        module,
        read,
        0,
        taps,
        _first_integer(EXPERT_NAMES, module),
        _first_integer(SLOT_NAMES, module),
    )


def _score_by_family(config: Any, layer: int | None) -> ScoreFunc | None:
    try:
        return RouterConfig.from_hf(config, layer).scored_by
    except (MoELabError, TypeError, IndexError, AttributeError):
        return None


def _recorded_classes(model: nn.Module) -> set[type]:
    """Classes whose outputs the library itself records as router logits."""
    classes: set[type] = set()
    for module in model.modules():
        entries = (getattr(type(module), "_can_record_outputs", None) or {}).get(
            "router_logits", []
        )
        for entry in entries if isinstance(entries, list) else [entries]:
            target = getattr(entry, "target_class", None)
            if isinstance(target, type):
                classes.add(target)
    return {cls for cls in classes if ROUTER_CLASS.search(cls.__name__)}


def _check_banks(
    named: Mapping[str, nn.Module], sites: list[Site], left_out: list[str], only: str | None
) -> None:
    """Raise where experts lie beside no router that was found."""
    covered = [site.name for site in sites] + left_out
    for name, module in named.items():
        if not _is_bank(name, module) or NOT_TEXT.search(name) or not re.search(only or "", name):
            continue
        block = name.rpartition(".")[0]
        if not any(
            router == block or router.startswith(block + "." if block else "") for router in covered
        ):
            got = f"none that is known beside {name!r} ({type(module).__name__})"
            raise TraceError(
                expected(
                    "a router for each bank of experts",
                    got,
                    f"readers={{'{block}.<router>': reader}}",
                )
            )


def _is_bank(name: str, module: nn.Module) -> bool:
    plain = (
        isinstance(module, nn.ModuleList | nn.ModuleDict) and name.rpartition(".")[2] == "experts"
    )
    return plain or bool(BANK_CLASS.search(type(module).__name__))


def _number(sites: list[Site]) -> None:
    """By the layer in the module's name, or, where two routers share one, by their order."""
    numbers = [_number_in(site.name) for site in sites]
    distinct = None not in numbers and len(set(numbers)) == len(numbers)
    for order, (site, number) in enumerate(zip(sites, numbers, strict=True)):
        site.layer = number if distinct and number is not None else order


def _number_in(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner()


def _first_integer(names: tuple[str, ...], *sources: Any) -> int | None:
    for source in sources:
        for name in names:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _beside(name: str, named: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    parent = named.get(name.rpartition(".")[0])
    return dict(parent.named_children()) if parent is not None and name else {}


def _inside(name: str, found: Mapping[str, Site]) -> bool:
    """Whether a router lies in another one (the gate of a block that is read whole)."""
    return any(above in found for above in paths_above(name))


def _hint(named: Mapping[str, nn.Module]) -> str:
    likely = [name for name in named if re.search(r"(router|gate)$", name)]
    return f"readers={{'{likely[0]}': reader}}" if likely else "readers={'<module name>': reader}"


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[1:4]) + ", ..."
