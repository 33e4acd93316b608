"""The MoE layers of ``moe_lab.model``, from their plain configuration: no import of torch is needed
to count them.

``ROUTERS`` says for each router kind what it learns beside its weight matrix, and how many experts
a token may run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.blocks import shared, width
from moe_lab.accounting.families.longcat import K_E, real_experts
from moe_lab.cost.formulas import gated_ffn
from moe_lab.cost.parts import ExpertsRun, Part, Piece, Pieces, linear, norm, times, vector
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.fields import Fields, nested

R = Part.ROUTER


def flatten_layer(moe: Mapping[str, Any]) -> Mapping[str, Any]:
    """``MoEConfig.to_dict()`` under the names used here."""
    router = nested(moe, "router")
    return {
        **router,
        "hidden_size": moe.get("d_model"),
        "num_hidden_layers": 1,
        "moe_intermediate_size": moe.get("d_expert"),
        "n_shared_experts": moe.get("num_shared_experts", 0),
        "moe_latent_size": moe.get("d_latent"),
        "zero_expert_num": router.get("num_zero_experts", 0),
        "num_experts_per_tok": router.get("top_k"),
        K_E: nested(router, "controller").get("target_ffn_count"),
    }


# ------------------------------------------------------------------------------------------------------------
# experts run


def fixed(f: Fields) -> ExpertsRun:
    """K slots, of which zero-computation experts take some."""
    return real_experts(f)[2]


def up_to(f: Fields) -> ExpertsRun:
    """Each token is cut on its own, at K at the latest; the mean depends on the data."""
    run = fixed(f)
    f.note(
        "count",
        f"{run.most:g} experts per token on average (the most that {f.get('kind')} allows; its mean depends on the data)",
    )
    return ExpertsRun(1, run.most, run.most)


def budget(f: Fields) -> ExpertsRun:
    """A mean of K, between ``min_slots`` and ``max_slots``."""
    run = fixed(f)
    return ExpertsRun(
        f.size_or("min_slots", 0), run.mean, f.size_or("max_slots", f.size("num_experts"))
    )


def some_tokens(f: Fields) -> ExpertsRun:
    """Mixture of depths: a share of the tokens passes."""
    return ExpertsRun(
        0, f.number("capacity_factor") if f.find("capacity_factor") is not None else 0.125, 1
    )


# ---------------------------------------------------------------------------------------------------
# beside the weight matrix


def choices(f: Fields) -> int:
    return f.size("num_experts") + f.size("zero_expert_num", 0)


def none(f: Fields) -> Pieces:
    return ()


def matrix(f: Fields) -> Pieces:
    return (linear(R, "router", width(f), choices(f), f.truth("router_bias")),)


def with_inkling(f: Fields) -> Pieces:
    gates = f.size_or("num_shared_gates", 1)
    return (
        linear(R, "router", width(f), f.size("num_experts") + gates),
        vector(R, "global_scale", 1),
    )


def with_zaya(f: Fields) -> Pieces:
    rank, d = f.size_or("d_router", 256, 1), width(f)
    return (
        linear(R, "down", d, rank, True),
        vector(R, "state_scale", rank),
        norm("router.norm", rank),
        linear(R, "hidden1", rank, rank, True),
        linear(R, "hidden2", rank, rank, True),
        linear(R, "router", rank, choices(f)),
    )


def with_vector(*sizes: Callable[[Fields], int]) -> Callable[[Fields], Pieces]:
    return lambda f: (*matrix(f), *(vector(R, "scale", size(f)) for size in sizes))


def with_noise(f: Fields) -> Pieces:
    return (*matrix(f), linear(R, "noise", width(f), f.size("num_experts")))


def with_residual(f: Fields) -> Pieces:
    return (*matrix(f), linear(R, "residual", choices(f), choices(f)))


def with_predictor(f: Fields) -> Pieces:
    return (*matrix(f), linear(R, "predictor", width(f), 1))


def one(f: Fields) -> int:
    return 1


def experts_of(f: Fields) -> int:
    return f.size("num_experts")


class Kind(NamedTuple):
    learned: Callable[[Fields], Pieces] = matrix
    used: Callable[[Fields], ExpertsRun] = fixed


_PLAIN = (
    "adamoe base deepseek_v2 deepseek_v3 gshard_top2 llama4 longcat pnorm_topk quantile_balanced scored_hash sigmoid_topk sinkhorn "
    "softmax_topk sparsemixer sqrt_softplus_topk switch token_choice topk_softmax"
)
ROUTERS: dict[str, Kind] = {
    **dict.fromkeys(_PLAIN.split(), Kind()),
    **dict.fromkeys(("hash", "random", "token_lookup"), Kind(none)),
    **dict.fromkeys(("d2dmoe", "top_p", "xmoe"), Kind(used=up_to)),
    **dict.fromkeys(
        ("expert_choice", "expert_threshold", "quantile_threshold", "remoe", "seq_topk"),
        Kind(used=budget),
    ),
    "dtop_p": Kind(with_vector(one), budget),
    "dynmoe": Kind(with_vector(one, experts_of), budget),
    "gemma": Kind(with_vector(width, experts_of)),
    "inkling": Kind(with_inkling),
    "mixture_of_depths": Kind(with_predictor, some_tokens),
    "moepp": Kind(with_residual),
    "noisy_topk": Kind(with_noise),
    "zaya": Kind(with_zaya),
}
"""Router kind -> what it learns, and how many experts a token runs."""


# ------------------------------------------------------------------------------------------------------------------
# layer


def constants(f: Fields, run: ExpertsRun) -> Pieces:
    """MoE++'s constant experts learn a mixture [2, D] and a vector [D]; the other zero-computation
    experts nothing.
    """
    zero, k = f.size("zero_expert_num", 0), f.size("num_experts_per_tok")
    if not zero:
        return ()
    idle = ExpertsRun(max(k - run.most, 0), max(k - run.mean, 0), max(k - run.least, 0))
    listed = f.optional("zero_expert_kinds")
    learned = max(zero - 2, 0) if f.get("kind") == "moepp" else 0
    learned = learned if listed is None else sum(kind == "constant" for kind in listed)
    share = ExpertsRun(*(slots * learned / zero for slots in idle))
    pieces = (Piece(Part.ZERO_EXPERT, "idle", copies=zero, used=idle),)
    if not learned:
        return pieces
    d = width(f)
    return (
        *pieces,
        *times(
            (linear(R, "mixture", d, 2), vector(R, "vector", d)), learned, share, Part.ZERO_EXPERT
        ),
    )


def layer(f: Fields) -> Pieces:
    """Router, real experts and the projections around them, zero-computation experts, shared
    experts.
    """
    kind = f.text("kind")
    if kind not in ROUTERS:
        raise ConfigError(
            expected(f"a router kind with a closed form ({', '.join(sorted(ROUTERS))})", repr(kind))
        )
    row = ROUTERS[kind]
    return (*row.learned(f), *routed(f, row.used(f)), *shared()(f))


def hash_layer(f: Fields) -> Pieces:
    """A hash layer beside layers of any router: a plain matrix that weighs K experts from a table."""
    k = f.size("num_experts_per_tok")
    return (
        linear(R, "router", width(f), f.size("num_experts")),
        *routed(f, ExpertsRun(k, k, k)),
        *shared()(f),
    )


def routed(f: Fields, run: ExpertsRun) -> Pieces:
    """Real experts, on the stream or on a latent of it, and zero-computation experts."""
    d, latent = width(f), f.size_or("moe_latent_size", 0)
    experts = times(
        gated_ffn(Part.ROUTED, latent or d, f.size("moe_intermediate_size")),
        f.size("num_experts"),
        run,
    )
    if not latent:
        return (*experts, *constants(f, run))
    around = (
        linear(Part.OTHER, "latent_down", d, latent),
        norm("latent_norm", latent),
        linear(Part.OTHER, "latent_up", latent, d),
    )
    return (*experts, *around, *constants(f, run))


ROWS = {"moe_lab_layer": Architecture(blocks=(layer,), top=none, prepare=flatten_layer)}
