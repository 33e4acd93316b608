"""The last section of a page: all that is needed to make the page again."""

from __future__ import annotations

import json
from typing import Any

from moe_lab.number_format import listing
from moe_lab.report.sections import Folded, Section
from moe_lab.report.sources import Material

MAX_CONFIGS = 120
"""Configurations on one page, about 2 kB each."""


def provenance(material: Material, command: str) -> Section:
    """Versions, corpus and tokenizer hashes, seeds and devices over all runs and traces; a fact
    that was not recorded is left out.
    """
    metas = [named.trace.meta.to_dict() for named in material.traces]
    records: list[dict[str, Any]] = [*(run.result for run in material.runs), *metas]
    versions = _distinct(
        f"{name} {version}"
        for record in records
        if isinstance(recorded := record.get("versions"), dict)  # a result may hold anything
        for name, version in recorded.items()
    )
    facts = {
        "Command of this page": [command],
        "Versions": versions,
        "Corpus hash": _distinct(record.get("corpus_hash") for record in records),
        "Tokenizer hash": _distinct(record.get("tokenizer_hash") for record in records),
        "Seeds": _distinct(record.get("seed") for record in records),
        "Devices": _distinct(record.get("device") for record in records),
        "Phase of the traces": _distinct(meta.get("phase") for meta in metas),
        "Traces made by": _distinct(meta.get("created_from") for meta in metas),
        "Notes of the traces": _distinct(
            note for meta in metas for note in meta.get("notes") or ()
        ),
    }
    with_config = [run for run in material.runs if run.begun]
    if len(with_config) > MAX_CONFIGS:
        facts["Configurations"] = [
            f"{MAX_CONFIGS} of {len(with_config)} are here; each lies in config.json of its run's "
            "folder"
        ]
    configs = tuple(
        Folded(
            run.label,
            lines=json.dumps(run.config, indent=1, sort_keys=True),
            anchor=f"config-{material.anchors[run.folder]}",
        )
        for run in with_config[:MAX_CONFIGS]
    )
    folded = Folded(f"Configuration of each run ({len(configs)})", inner=configs)
    return Section(
        "made",
        "How it was made",
        "How it was made",
        facts=tuple((name, listing(values, most=24)) for name, values in facts.items() if values),
        folded=(folded,) if configs else (),
    )


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value not in (None, "")))
