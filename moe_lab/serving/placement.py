"""``place``: which device holds which experts of each layer, from their load; how even the devices
then are, and how even they could be.

An expert may have several replicas, which share its tokens equally. Zero-compute experts need no
device. Methods:

- ``contiguous``: experts in order of their number, as engines place them by default; spare slots
  hold the first experts again.
- ``greedy``: replicas go to the experts with the most load a replica; then each replica, the
  heaviest first, to the least loaded device that has a free slot and not yet this expert.
- ``eplb``: DeepSeek's load balancer (github.com/deepseek-ai/EPLB at d52c72d): groups of experts are
  packed onto nodes, replicas made within nodes, replicas packed onto devices; its global policy
  where the groups are not a multiple of the nodes. ``eplb_global``: the global policy.

``placement_bound`` is the least load of the fullest device that any placement can have.
Shape letters: L layers, E real experts, S slots (physical experts), D devices.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.serving.policies import METHODS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """The placement of the experts of each layer on devices.

    Attributes:
        layers: [L] layer numbers.
        physical_to_logical: [L, S] the expert in each slot; device d holds slots d S/D .. .
        num_experts, devices, nodes: of the model and the machine.
    """

    layers: tuple[int, ...]
    physical_to_logical: Ints
    num_experts: int
    devices: int
    nodes: int = 1

    @property
    def replicas(self) -> Ints:
        """[L, E] replicas of each expert."""
        layers = len(self.physical_to_logical)
        counts = np.zeros((layers, self.num_experts), np.int64)
        np.add.at(counts, (np.arange(layers)[:, None], self.physical_to_logical), 1)
        return counts

    @property
    def shares(self) -> Floats:
        """[L, E, D] the part of each expert's tokens that a device runs."""
        layers, slots = self.physical_to_logical.shape
        device_S = np.arange(slots) * self.devices // slots
        table = np.zeros((layers, self.num_experts, self.devices))
        np.add.at(table, (np.arange(layers)[:, None], self.physical_to_logical, device_S), 1.0)
        return table / self.replicas[:, :, None]

    def device_load(self, load: ArrayLike) -> Floats:
        """[L, D] slots run by each device under ``load`` [L, E]; raises ``AnalysisError`` for
        a load of other layers or experts.
        """
        load_LE = np.asarray(load, np.float64)
        shape = len(self.physical_to_logical), self.num_experts
        require(
            load_LE.shape == shape, f"a load of shape {shape}", load_LE.shape, error=AnalysisError
        )
        return np.einsum("le,led->ld", load_LE, self.shares)

    def imbalance(self, load: ArrayLike) -> Floats:
        """[L] load of the fullest device over the mean; 1 is even, NaN where nothing ran."""
        loads = self.device_load(load)
        mean = loads.mean(axis=1)
        return np.divide(loads.max(axis=1), mean, out=np.full(len(mean), np.nan), where=mean > 0)


def place(
    load: "pl.DataFrame | ArrayLike",
    devices: int,
    slots: int | None = None,
    method: str = "eplb",
    *,
    nodes: int = 1,
    groups: int = 1,
) -> Placement:
    """A placement of every layer.

    Args:
        load: [L, E] slots or tokens of each real expert, or a frame as ``Trace.counts``.
        devices: in all.
        slots: physical experts of a layer in all devices, a multiple of ``devices``; as many as
            experts by default. More of them are replicas.
        method: of ``METHODS``.
        nodes: groups of devices with a fast connection inside.
        groups: groups of experts that a token's choice is limited to (``n_group``).

    Raises:
        ConfigError: numbers that do not divide each other, fewer slots than experts.
        AnalysisError: layers with different numbers of experts, or negative loads.

    Example:
        >>> placement = place(trace.counts(), devices=8, slots=72)
        >>> placement.imbalance(other_trace_load)
    """
    layers, load_LE = load_table(load)
    experts = load_LE.shape[1]
    slots = _slots(experts, devices, slots)
    require(method in METHODS, f"a method among {', '.join(METHODS)}", repr(method), field="method")
    _whole(nodes=nodes, groups=groups)
    divides = devices % nodes == 0
    require(divides, f"devices that are a multiple of {nodes} nodes", devices, field="nodes")
    divides = experts % groups == 0
    require(divides, f"groups that divide {experts} experts", groups, field="groups")
    if method == "contiguous":
        physical = np.tile(np.arange(slots) % experts, (len(load_LE), 1))
    elif method == "greedy":
        physical = np.stack([_greedy(row, slots, devices) for row in load_LE])
    else:
        hierarchical = method == "eplb" and groups % nodes == 0
        physical = _eplb(load_LE, slots, devices, *((groups, nodes) if hierarchical else (1, 1)))
    return Placement(layers, physical, experts, devices, nodes)


def _whole(**numbers: object) -> None:
    for name, number in numbers.items():
        fits = isinstance(number, int | np.integer) and number >= 1
        require(fits, f"{name} as a whole number of at least 1", number, field=name)


def _slots(experts: int, devices: int, slots: int | None) -> int:
    """The number of slots, ``experts`` where it is not given; checked."""
    slots = experts if slots is None else slots
    _whole(devices=devices, slots=slots)
    require(
        slots >= experts, f"at least {experts} slots, one for each expert", slots, field="slots"
    )
    require(
        slots % devices == 0,
        f"slots that are a multiple of {devices} devices",
        slots,
        f"{-(-slots // devices) * devices} slots, in which some experts have replicas",
        field="slots",
    )
    return slots


def load_table(load: "pl.DataFrame | ArrayLike") -> tuple[tuple[int, ...], Floats]:
    """(layer numbers, [L, E] load of the real experts); raises as ``place``."""
    if isinstance(load, pl.DataFrame):
        missing = {"layer", "expert", "count"} - set(load.columns)
        if missing:
            raise AnalysisError(
                expected("a frame with layer, expert and count", f"none of {sorted(missing)}")
            )
        real = load.filter(~pl.col("is_zero")) if "is_zero" in load.columns else load
        numbered = real.sort("layer", "expert").select(
            (pl.int_range(pl.len()).over("layer") == pl.col("expert")).all()
        )
        require(numbered.item(), "experts 0, 1, ... in every layer", "others", error=AnalysisError)
        sizes = real.group_by("layer").len().sort("layer")
        if sizes["len"].n_unique() != 1:
            raise AnalysisError(expected("layers with one number of experts", "several"))
        layers = tuple(int(layer) for layer in sizes["layer"])
        table = real.sort("layer", "expert")["count"].to_numpy().astype(np.float64)
        table = table.reshape(len(layers), -1)
    else:
        try:
            table = np.asarray(load, np.float64)
        except (TypeError, ValueError):
            table = np.zeros(0)
        layers = tuple(range(len(table))) if table.ndim else ()
    if table.ndim != 2 or not table.size or not np.isfinite(table).all() or (table < 0).any():
        what = "a load [layers, experts] of numbers of at least 0"
        raise AnalysisError(expected(what, f"shape {list(table.shape)}"))
    return layers, table


def placement_bound(
    load: "pl.DataFrame | ArrayLike", devices: int, slots: int | None = None
) -> Floats:
    """[L] the least load of the fullest device, over the mean, that any placement can have.

    The mean over devices, and a linear program (HiGHS): n_{er} is the part of expert e with r
    replicas; minimise C over ``sum_r n_er = 1``, ``sum_er r n_er <= S`` and ``sum_r n_er w_e / r <=
    C``. Without replicas also the pigeonhole: of the m D + 1 heaviest experts some device holds m +
    1, and fills its other slots with the lightest.

    Raises:
        ConfigError, AnalysisError: as ``place``.
    """
    _, load_LE = load_table(load)
    experts = load_LE.shape[1]
    slots = _slots(experts, devices, slots)
    bounds = np.full(len(load_LE), np.nan)
    for place_, row in enumerate(load_LE):
        if row.sum() > 0:
            mean = row.sum() / devices
            least = max(mean, _pigeonhole(row, devices) if slots == experts else 0.0)
            spare = slots - experts
            # Whole replicas are one solution of the program: where they are light, so is it.
            if spare and _replicas(row[None], spare)[1].max() > mean:
                least = max(least, _replica_program(row[row > mean], spare, mean))
            bounds[place_] = least / mean
    return bounds


def _pigeonhole(row: Floats, devices: int) -> float:
    ordered, each = np.sort(row)[::-1], len(row) // devices
    least = 0.0
    for more in range(each):
        heavy = ordered[: more * devices + 1][-(more + 1) :]
        fill = each - more - 1
        least = max(least, heavy.sum() + (ordered[-fill:].sum() if fill else 0.0))
    return float(least)


def _replica_program(heavy: Floats, spare: int, least: float) -> float:
    """The least C of the linear program, at least ``least``; only the ``heavy`` experts above it
    need a second replica.
    """
    from scipy.optimize import linprog

    most = spare + 1
    replicas = np.tile(np.arange(1, most + 1), len(heavy))
    expert = np.repeat(np.arange(len(heavy)), most)
    one_each = (expert == np.arange(len(heavy))[:, None]).astype(float)
    weight = one_each * heavy[:, None] / replicas / heavy.max()
    slots = np.append(replicas, 0.0)[None]
    found = linprog(
        np.append(np.zeros(len(replicas)), 1.0),
        A_ub=np.vstack([np.hstack([weight, -np.ones((len(heavy), 1))]), slots]),
        b_ub=np.append(np.zeros(len(heavy)), len(heavy) + spare),
        A_eq=np.hstack([one_each, np.zeros((len(heavy), 1))]),
        b_eq=np.ones(len(heavy)),
        bounds=[*[(0, None)] * len(replicas), (least / heavy.max(), None)],
        method="highs",
    )
    return float(found.fun) * heavy.max() * (1 - 1e-9) if found.success else least


def _greedy(row: Floats, slots: int, devices: int) -> Ints:
    replicas = _replicas(row[None], slots - len(row))[2][0]
    weight = row / replicas
    room = np.full(devices, slots // devices)
    loads = np.zeros(devices)
    held: list[list[int]] = [[] for _ in range(devices)]
    for expert in np.argsort(-weight, kind="stable"):
        for _ in range(replicas[expert]):
            free = np.flatnonzero(room > 0)
            new = [device for device in free if expert not in held[device]] or free
            device = min(new, key=lambda one: (loads[one], one))
            held[device].append(int(expert))
            loads[device] += weight[expert]
            room[device] -= 1
    return np.concatenate([np.array(one, np.int64) for one in held])


# --------------------------------------------------------------------------------------------------
# EPLB


def _eplb(load_LE: Floats, slots: int, devices: int, groups: int, nodes: int) -> Ints:
    """[L, S] experts in slots by the hierarchical policy; with one group and one node, the global.

    Loads are rounded to f32, as the reference does, so that ties fall alike.
    """
    load_LE = load_LE.astype(np.float32).astype(np.float64)
    layers, experts = load_LE.shape
    size, rows = experts // groups, np.arange(layers)[:, None]
    group_load = load_LE.reshape(layers, groups, size).sum(axis=2)
    node, rank = _packed(group_load, nodes)
    start = (node * (groups // nodes) + rank) * size
    ordered_of = (start[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_of = np.argsort(ordered_of, axis=1)
    within = np.take_along_axis(load_LE, expert_of, 1).reshape(layers * nodes, experts // nodes)
    replica_of, _, count = _replicas(within, (slots - experts) // nodes)
    weight = np.take_along_axis(within / count, replica_of, 1)
    device, rank = _packed(weight, devices // nodes)
    order = np.argsort(device * (slots // devices) + rank, axis=1)
    ordered = np.take_along_axis(replica_of, order, 1).reshape(layers, nodes, -1)
    ordered = ordered + (np.arange(nodes) * (experts // nodes))[:, None]
    return expert_of[rows, ordered.reshape(layers, slots)]


def _replicas(load: Floats, spare: int) -> tuple[Ints, Floats, Ints]:
    """(expert of each replica [X, E + spare], load a replica [X, E], replicas [X, E]): each spare
    slot goes to the expert with the most load a replica.
    """
    rows, experts = load.shape
    expert_of = np.tile(np.arange(experts + spare), (rows, 1))
    count = np.ones((rows, experts), np.int64)
    at = np.arange(rows)
    for slot in range(experts, experts + spare):
        chosen = (load / count).argmax(axis=1)
        expert_of[:, slot] = chosen
        count[at, chosen] += 1
    return expert_of, load / count, count


def _packed(weight: Floats, packs: int) -> tuple[Ints, Ints]:
    """(pack [X, n], rank in it [X, n]) of n items in packs of equal number: the heaviest first,
    each to the lightest pack that is not full.
    """
    rows, items = weight.shape
    each = items // packs
    if each == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    pack_of, rank_of = np.zeros((rows, items), np.int64), np.zeros((rows, items), np.int64)
    for row in range(rows):
        heap: list[tuple[float, int]] = [(0.0, pack) for pack in range(packs)]
        filled = [0] * packs
        values = weight[row].tolist()
        for item in np.argsort(-weight[row], kind="stable").tolist():
            total, pack = heapq.heappop(heap)
            pack_of[row, item], rank_of[row, item] = pack, filled[pack]
            filled[pack] += 1
            if filled[pack] < each:
                heapq.heappush(heap, (total + values[item], pack))
    return pack_of, rank_of


def placement_load(placement: Placement, load: Any) -> pl.DataFrame:
    """The evenness of the devices under a load.

    Returns:
        [layer, device, load (over the mean of the devices), experts (list of those it holds)].
    """
    _, load_LE = load_table(load)
    loads = placement.device_load(load_LE)
    mean = loads.mean(axis=1, keepdims=True)
    relative = np.divide(loads, mean, out=np.full_like(loads, np.nan), where=mean > 0)
    layers = len(placement.layers)
    held = placement.physical_to_logical.reshape(layers * placement.devices, -1)
    return pl.DataFrame(
        {
            "layer": np.repeat(np.array(placement.layers, np.uint32), placement.devices),
            "device": np.tile(np.arange(placement.devices), layers),
            "load": relative.ravel(),
            "experts": held.tolist(),
        }
    ).with_columns(pl.col("load").fill_nan(None))
