"""A placement in the files that serving engines read: the expert map of vLLM on Ascend
(``expert_map_path``, vllm_ascend/eplb) and SGLang's ``--init-expert-location``; and back.
"""

from pathlib import Path

import numpy as np

from moe_lab.errors import AnalysisError, expected
from moe_lab.files import write_json
from moe_lab.json_input import list_of, read_json_file, record, whole
from moe_lab.serving.placement import Placement

MAX = 2**16
_DEVICE = record(device_id=whole(0, MAX), device_expert=list_of(whole(0, MAX)))
_LAYER = record(layer_id=whole(0, 99_999), device_count=whole(1, MAX), device_list=list_of(_DEVICE))
_VLLM = record(moe_layer_count=whole(1, 4096), layer_list=list_of(_LAYER, 4096))
_SGLANG = record(physical_to_logical_map=list_of(list_of(whole(0, MAX)), 99_999))


def write_vllm_expert_map(placement: Placement, path: Path | str) -> None:
    """``moe_layer_count`` and, for each MoE layer counted from 0, ``device_list`` with the experts
    of each device. An existing file is replaced when the new one is complete.
    """
    held = placement.physical_to_logical.reshape(len(placement.layers), placement.devices, -1)
    layers = [
        {
            "layer_id": number,
            "device_count": placement.devices,
            "device_list": [
                {"device_id": device, "device_expert": experts.tolist()}
                for device, experts in enumerate(devices)
            ],
        }
        for number, devices in enumerate(held)
    ]
    write_json(Path(path), {"moe_layer_count": len(layers), "layer_list": layers})


def write_sglang_locations(placement: Placement, path: Path | str) -> None:
    """``physical_to_logical_map``, a row for each layer of the model up to the last placed one;
    layers without a placement (dense ones) have the engine's own order.
    """
    slots = placement.physical_to_logical.shape[1]
    rows = np.tile(np.arange(slots) % placement.num_experts, (max(placement.layers) + 1, 1))
    rows[list(placement.layers)] = placement.physical_to_logical
    write_json(Path(path), {"physical_to_logical_map": rows.tolist()})


def read_vllm_expert_map(path: Path | str, num_experts: int) -> Placement:
    """The placement of such a file; raises ``ConfigError`` or ``AnalysisError``."""
    values = _VLLM(read_json_file(Path(path)), Path(path).name)
    rows = [
        [expert for device in layer["device_list"] for expert in device["device_expert"]]
        for layer in values["layer_list"]
    ]
    devices = {layer["device_count"] for layer in values["layer_list"]}
    counts = {
        len(device["device_expert"])
        for layer in values["layer_list"]
        for device in layer["device_list"]
    }
    if len(devices) != 1 or len(counts) != 1 or len(rows) != values["moe_layer_count"]:
        what = "layers of one number of devices and slots"
        raise AnalysisError(expected(f"{what} in {Path(path).name}", "others"))
    return _checked(rows, tuple(range(len(rows))), num_experts, devices.pop(), Path(path).name)


def read_sglang_locations(path: Path | str, num_experts: int, devices: int) -> Placement:
    """The placement of such a file; raises as ``read_vllm_expert_map``."""
    values = _SGLANG(read_json_file(Path(path)), Path(path).name)
    rows = values["physical_to_logical_map"]
    return _checked(rows, tuple(range(len(rows))), num_experts, devices, Path(path).name)


def _checked(
    rows: list[list[int]], layers: tuple[int, ...], num_experts: int, devices: int, where: str
) -> Placement:
    slots = {len(row) for row in rows}
    whole_rows = all(set(row) == set(range(num_experts)) for row in rows)
    if len(slots) != 1 or slots.copy().pop() % devices or not whole_rows:
        what = f"each of {num_experts} experts in every layer, slots a multiple of {devices}"
        raise AnalysisError(expected(f"{what} in {where}", "others"))
    return Placement(layers, np.array(rows, np.int64), num_experts, devices)
