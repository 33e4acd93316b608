"""``ARCHITECTURES``: model type -> the pieces of its layers, one file for each kind of attention or
model.
"""

from moe_lab.accounting.architecture import Architecture
from moe_lab.accounting.families import (
    deepseek,
    deepseek_v41,
    dense,
    encoder_decoder,
    gemma,
    grouped,
    grouped_shared,
    inkling,
    jetmoe_doge,
    latent,
    linear,
    longcat,
    muse_spark,
    own_code,
    qwen,
    state_space,
    zaya,
)

ARCHITECTURES: dict[str, Architecture] = {
    **deepseek.ROWS,
    **deepseek_v41.ROWS,
    **dense.ROWS,
    **encoder_decoder.ROWS,
    **gemma.ROWS,
    **grouped.ROWS,
    **grouped_shared.ROWS,
    **inkling.ROWS,
    **jetmoe_doge.ROWS,
    **latent.ROWS,
    **linear.ROWS,
    **longcat.ROWS,
    **muse_spark.ROWS,
    **own_code.ROWS,
    **qwen.ROWS,
    **state_space.ROWS,
    **zaya.ROWS,
}
