"""The one table of Hugging Face architectures: counting, importing and routing agree on experts,
slots and sparse layers of every model type that is counted, or ``NO_ROUTER`` says why not.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import count
from moe_lab.accounting.families import ARCHITECTURES as COUNTED
from moe_lab.accounting.model_names import facts
from moe_lab.errors import ConfigError
from moe_lab.hf.architectures import ARCHITECTURES, SAME_AS, row_name
from moe_lab.hf.configuration import language_model, model_type, plain, router_sizes
from moe_lab.hf.fields import names_of
from moe_lab.routing import RouterConfig
from moe_lab.routing.hf_config import FAMILIES

OWN = {"moe_lab", "moe_lab_layer"}
NO_ROUTER = {
    "nomic_bert": "code of its own, which transformers does not have to compare with",
    "klear": "code of its own, which transformers does not have to compare with",
    "grok1": "code of its own, which transformers does not have to compare with",
    "bailing_moe_linear": "code of its own, which transformers does not have to compare with",
    "bailing_moe": "code of its own, which transformers does not have to compare with",
    "bamba": "no experts",
    **dict.fromkeys(("llama", "mistral", "olmo2", "qwen2", "qwen3"), "no experts"),
    "doge": "an expert's choice depends on the other tokens of the batch",
    "gemma4_unified_text": "no class of its own in transformers records its router",
    "granite_docling_text": "no experts",
    "hunyuan": "code of its own, which transformers does not have to compare with",
    "longcat2": "no public code",
    "longcat_flash_ngram": "code of its own, which transformers does not have to compare with",
}
SETTINGS = {
    "expert_selection_fn": "sigmoid",
    "moe_norm_min": 1e-12,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "router_hidden_size": 256,
    "router_jitter_noise": 0.01,
    "scoring_func": "sigmoid",
    "topk_method": "greedy",
}
"""What a router needs beside its sizes; the published data keeps only what counts depend on."""
ONE_GROUP = {"n_group": 1, "num_expert_group": 1, "topk_group": 1, "n_shared_experts": 1}


def compare(config: Any) -> str:
    """Check one configuration; returns the row of its model type."""
    name = row_name(model_type(language_model(plain(config)))[0])
    counted = count(config)
    if not counted.moe_layers:
        with pytest.raises(ConfigError, match="sparse layers"):
            router_sizes(config)
        return name
    sizes = router_sizes(config)
    assert sizes.moe_layers == tuple(counted.moe_layers), name
    piece = counted.moe_layers[sizes.moe_layers[0]]
    assert piece.used is not None
    slots = min(sizes.top_k, sizes.num_experts)
    assert (sizes.num_experts, slots) == (piece.copies, piece.used.most), name
    layers = {layer for layer, part in counted.pieces() if layer is not None and part.part != "mtp"}
    assert sizes.num_layers == len(layers), name
    if name not in NO_ROUTER:
        values = {**language_model(plain(config)), **ONE_GROUP}
        values |= {
            field: value
            for field, value in SETTINGS.items()
            if not any(values.get(alias) is not None for alias in names_of(field))
        }
        router = RouterConfig.from_hf(values, sizes.moe_layers[0])
        got = (router.num_experts, router.num_zero_experts, router.top_k)
        assert got == (sizes.num_experts, sizes.num_zero_experts, sizes.top_k), name
    return name


def test_every_counted_model_type_has_a_row_and_a_router_or_a_reason() -> None:
    rows = set(ARCHITECTURES) - {"dbrx_ffn", "qwen3_omni_moe_talker_text"}  # parts of a model
    assert rows == set(COUNTED) - OWN
    assert rows - set(FAMILIES) == set(NO_ROUTER)
    assert set(FAMILIES) <= set(ARCHITECTURES)
    assert set(SAME_AS.values()) <= set(ARCHITECTURES)


@pytest.mark.parametrize("entry", facts(), ids=lambda entry: entry["name"])
def test_a_published_model_has_one_size_everywhere(entry: dict[str, Any]) -> None:
    compare(entry["config"])


MOE_CLASS = re.compile(r"^class \w*(Experts|Router)\w*\(|^class \w*(MoE|Moe|Gating)\w*\(nn\.", re.M)
MOE_FIELD = re.compile(r"num_(local_|routed_)?experts|n_routed_experts")
NOT_MOE = {
    "kyutai_speech_to_text": "its gating MLP has no experts",
    "moshi": "its gating MLP has no experts",
}
"""Directories with a class or field that is named like those of experts, and why it is not one."""
TEXT_ELSEWHERE = {"nemotron3_5_transcribe": "nemotron_h"}
"""A directory whose text part is a model of another directory."""


def moe_directories() -> list[str]:
    """Directories of the installed transformers with experts in a class or in a configuration."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    found = []
    for folder in sorted(Path(transformers.__file__).parent.joinpath("models").iterdir()):
        texts = {
            kind: "".join(path.read_text("utf-8") for path in folder.glob(f"{kind}_*.py"))
            for kind in ("modeling", "configuration")
        }
        if MOE_CLASS.search(texts["modeling"]) or MOE_FIELD.search("".join(texts.values())):
            found.append(folder.name)
    return found


@pytest.mark.hf
def test_every_moe_directory_of_the_installed_transformers_is_known_or_refused_by_name() -> None:
    """What a new version brings fails here by its name: it needs a row for counting, one for
    routing, and a tiny model (``hf_tiny_families``) by which both and capturing are tested.
    """
    from hf_tiny_families import FAMILIES as TINY
    from hf_tiny_families import NOT_COVERED

    directories = moe_directories()
    assert len(directories) > 70
    refused = {*NOT_MOE, *NOT_COVERED}
    unknown = [name for name in directories if not known(name, {*TINY}) and name not in refused]
    assert unknown == []


def known(directory: str, tiny: set[str]) -> bool:
    """Is there a tiny model of the directory, and do its model types count and route?"""
    module = importlib.import_module(f"transformers.models.{directory}")
    text = Path(module.__file__ or "").parent.joinpath(f"configuration_{directory}.py").read_text()
    types = {row_name(name) for name in re.findall(r'model_type = "([\w-]+)"', text)}
    types |= {TEXT_ELSEWHERE.get(directory, "")}
    rows = types & set(COUNTED)
    routed = rows & ({*FAMILIES} | {*NO_ROUTER})
    return bool(routed) and rows == routed and (directory in tiny or directory in TEXT_ELSEWHERE)


def test_a_directory_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from hf_tiny_families import FAMILIES as TINY

    assert known("mixtral", {*TINY})
    assert not known("mixtral", {*TINY} - {"mixtral"})
    monkeypatch.delitem(FAMILIES, "mixtral")
    assert not known("mixtral", {*TINY})
    assert not known("llama", {*TINY})


@pytest.mark.hf
def test_every_model_type_of_transformers_has_one_size_everywhere() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from hf_tiny_families import FAMILIES as TINY
    from hf_tiny_families import SINCE_5_24
    from hf_tiny_models import draw

    met = {compare(draw(name, seed)[0]) for name in TINY for seed in range(2)}
    met |= {compare(entry["config"]) for entry in facts()}
    newer = {row_name(name) for name in {*SINCE_5_24} - {*TINY}}
    own_code = {"bailing_moe_linear", "grok1", "hunyuan", "klear", "nomic_bert"}
    dense = {"llama", "mistral", "olmo2", "qwen2", "qwen3"}  # nothing routes in them
    assert set(COUNTED) - OWN - met <= own_code | newer | dense


NAMES = ["text_config", "llm_config", "language_config", "thinker_config", "language_model_config"]


@pytest.mark.parametrize("part", NAMES)
def test_the_text_part_is_found_by_all_three(part: str) -> None:
    inner = next(dict(e["config"]) for e in facts() if e["name"] == "Qwen/Qwen3-30B-A3B")
    outer = {"model_type": "some_vl", part: inner}
    assert router_sizes(outer) == router_sizes(inner)
    assert count(outer).total == count(inner).total
    inner |= {"norm_topk_prob": True}
    assert RouterConfig.from_hf({**outer, part: inner}) == RouterConfig.from_hf(inner)
