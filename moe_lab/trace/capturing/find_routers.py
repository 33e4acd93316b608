"""The modules to hook: which modules of a model route, how each is read, and how many experts and
slots it has by its configuration.

Routers of this library are found by their type, those of transformers by what the library records
as router logits or by their class name beside a bank of experts, those of torchtitan and Megatron
by their class name (``trainer_routers``), all others by the caller's ``readers``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from moe_lab.errors import ConfigError, MoELabError, TraceError, expected, require
from moe_lab.hf import architectures
from moe_lab.hf.configuration import text_fields
from moe_lab.hf.fields import Fields, names_of
from moe_lab.routing import Router, RouterConfig
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.capturing.hf_router_outputs import HF_ROUTERS, HFRouter
from moe_lab.trace.capturing.router_output import Reader, triple
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.trace.capturing.trainer_routers import TRAINER_ROUTERS

ROUTER_CLASS = re.compile(r"(Router|Gate|Gating)$")
BANK_CLASS = re.compile(r"(?<!Shared)(Experts|ExpertBank)$")
NOT_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech_encoder)")
"""Parts of a multimodal model whose tokens are not those of the text."""

Modules = Mapping[str, nn.Module]


def find_sites(
    model: nn.Module, readers: Mapping[str, Reader] | None, only: str | None
) -> tuple[list[TracedRouter], list[str]]:
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
    by_caller = {name: _custom(name, named, read) for name, read in _matched(named, readers or {})}
    sites = dict(by_caller)
    config, recorded = _text_config(model), _recorded_classes(model)
    for name, module in named.items():
        if name in sites:
            continue
        if isinstance(module, Router):
            sites[name] = _own(name, module)
        elif (row := _hf_row(name, module, named, recorded)) is not None:
            sites[name] = _hf(name, module, row, named, config)
    outermost = [
        name for name in named if name in sites and not any(a in sites for a in paths_above(name))
    ]  # the gate of a block that is read whole lies inside another site
    left_out = [name for name in outermost if NOT_TEXT.search(name) and name not in by_caller]
    kept = [
        sites[name] for name in outermost if name not in left_out and re.search(only or "", name)
    ]
    require(
        kept,
        "a model with routers",
        f"{type(model).__name__} without any that is known",
        _hint(named),
        error=TraceError,
        field="readers",
    )
    _check_banks(named, [*left_out, *(site.name for site in kept)], only)
    _check_stacks(kept)
    _number(kept, _visits(config))
    return kept, left_out


def paths_above(name: str) -> Iterator[str]:
    """The names of the modules around ``name``, the closest first, the whole model ("") last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


# ------------------------------------------------------------------------------------------------
# sites


def _matched(named: Modules, readers: Mapping[str, Reader]) -> Iterator[tuple[str, Reader]]:
    """(module name, reader) for each module that a pattern of the caller's matches."""
    for pattern, read in readers.items():
        names = [name for name in named if re.fullmatch(pattern, name)]
        if not names:
            some = ", ".join(repr(name) for name in list(named)[1:4])
            raise TraceError(
                expected(f"a module named {pattern!r}", "none", f"a name among {some}, ..."),
                field="readers",
            )
        yield from ((name, read) for name in names)


def _custom(name: str, named: Modules, read: Reader) -> TracedRouter:
    """A module of the user's: the experts beside it are seen too, and sizes are read where it has
    them.
    """
    experts = _beside(name, named).get("experts")
    taps = {} if experts is None else {"experts": experts}
    module = named[name]
    experts_and_k = _size("num_experts", module), _size("num_experts_per_tok", module)
    return TracedRouter(name, module, read, 0, taps, *experts_and_k)


def _own(name: str, module: Router) -> TracedRouter:
    config = module.config
    kinds = tuple(kind.value for kind in config.zero_kinds) if config.num_zero_experts else ()
    return TracedRouter(
        name,
        module,
        lambda module, seen: seen["output"],
        0,
        {},
        config.num_experts,
        config.num_slots,
        config.num_zero_experts,
        kinds,
        config.scored_by,
    )


def _hf_row(name: str, module: nn.Module, named: Modules, recorded: set[type]) -> HFRouter | None:
    """How a class of the library is read; None: it does not route."""
    row = (HF_ROUTERS | TRAINER_ROUTERS).get(type(module).__name__)
    by_name = ROUTER_CLASS.search(type(module).__name__) and "experts" in _beside(name, named)
    return row or (HFRouter() if type(module) in recorded or by_name else None)


def _hf(name: str, module: nn.Module, row: HFRouter, named: Modules, config: Any) -> TracedRouter:
    block = module if row.block else named.get(name.rpartition(".")[0], module)
    wanted = row.taps or (("experts",) if row.read is triple else ())
    children = dict(block.named_children())
    layer = _number_in(name)
    fields = _fields(config, layer)
    facts = None if fields is None else architectures.find(fields.family)
    slots = facts.top_k if facts is not None else None
    idle = 0 if facts is None or fields is None else facts.idle(fields)
    return TracedRouter(
        name,
        module,
        row.read,
        0,
        {child: children[child] for child in wanted if child in children},
        _size("num_experts", module, config, fields),
        slots or _size("num_experts_per_tok", module, config, fields),
        idle,
        (row.zero_kind,) * idle,
        _score_func(config, layer),
    )


def _fields(config: Any, layer: int | None) -> Fields | None:
    """A layer's configuration; None where its model type is not in the table."""
    try:
        fields = text_fields(config)
    except ConfigError:
        return None
    return fields if layer is None else fields.at(layer)


def _score_func(config: Any, layer: int | None) -> ScoreFunc | None:
    try:
        return RouterConfig.from_hf(config, layer).scored_by
    except MoELabError:
        return None


def _size(
    field: str, module: nn.Module, config: Any = None, fields: Fields | None = None
) -> int | None:
    """A size by any of its names: of the module, of its own configuration, of the model's."""
    names = ("top_k", *names_of(field)) if field == "num_experts_per_tok" else names_of(field)
    held = fields.find(field) if fields is not None else None
    if fields is not None and fields.layer is not None and isinstance(held, list):
        held = held[fields.layer] if fields.layer < len(held) else None
    sources = (module, getattr(module, "config", None), config)
    values = [getattr(source, name, None) for source in sources for name in names]
    return next((value for value in (*values, held) if type(value) is int and value > 0), None)


# ------------------------------------------------------------------------------------------------
# checks and numbers


def _check_banks(named: Modules, covered: Sequence[str], only: str | None) -> None:
    """Raise where experts lie beside no router that was found."""
    for name, module in named.items():
        if not _is_bank(name, module) or NOT_TEXT.search(name) or not re.search(only or "", name):
            continue
        block = name.rpartition(".")[0]
        inside = block + "." if block else ""
        require(
            any(router == block or router.startswith(inside) for router in covered),
            "a router for each bank of experts",
            f"none that is known beside {name!r} ({type(module).__name__})",
            f"readers={{'{block}.<router>': reader}}",
            error=TraceError,
            field="readers",
        )


def _is_bank(name: str, module: nn.Module) -> bool:
    listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
    return (listed and name.rpartition(".")[2] == "experts") or bool(
        BANK_CLASS.search(type(module).__name__)
    )


def _check_stacks(sites: Sequence[TracedRouter]) -> None:
    parts = [part for site in sites for part in site.name.split(".")]
    require(
        "encoder" not in parts or "decoder" not in parts,
        "the routers of one stack, whose tokens are the same",
        "encoder and decoder",
        "only='decoder' or 'encoder'",
        error=TraceError,
        field="only",
    )


def _number(sites: Sequence[TracedRouter], visits: Sequence[int]) -> None:
    """By the layer in the module's name, or, where two routers share one, by their order.

    ``visits``: the layers of the model in the order in which a token goes through them.
    """
    numbers = [_number_in(site.name) for site in sites]
    distinct = None not in numbers and len(set(numbers)) == len(numbers)
    for order, (site, number) in enumerate(zip(sites, numbers, strict=True)):
        site.layer = number if distinct and number is not None else order
        places = tuple(place for place, layer in enumerate(visits) if layer == site.layer)
        site.visits = places or (site.layer,)


def _visits(config: Any) -> Sequence[int]:
    """The order of the layers where some run several times, else nothing."""
    fields = _fields(config, None)
    order = [] if fields is None else architectures.visits(fields)
    return order if len(order) > len(set(order)) else ()


def _number_in(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner()


def _recorded_classes(model: nn.Module) -> set[type]:
    """Classes whose outputs the library itself records as router logits."""
    tables = [
        getattr(type(module), "_can_record_outputs", None) or {} for module in model.modules()
    ]
    entries = [table["router_logits"] for table in tables if "router_logits" in table]
    listed = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    classes = [getattr(entry, "target_class", None) for entry in listed]
    return {cls for cls in classes if isinstance(cls, type) and ROUTER_CLASS.search(cls.__name__)}


def _beside(name: str, named: Modules) -> dict[str, nn.Module]:
    parent = named.get(name.rpartition(".")[0])
    return dict(parent.named_children()) if parent is not None and name else {}


def _hint(named: Modules) -> str:
    likely = next((name for name in named if re.search(r"(router|gate)$", name)), "<module name>")
    return f"readers={{'{likely}': reader}}"
