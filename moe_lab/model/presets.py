"""``preset(name)``: a published architecture in small.

The table is ``moe_lab.accounting.minis``, which counts them without torch.
"""

from typing import Any

from moe_lab.accounting.minis import MINIS, mini_config
from moe_lab.model.config import DecoderConfig

PRESETS = tuple(MINIS)


def preset(name: str, **changes: Any) -> DecoderConfig:
    """The decoder of that name, with ``changes`` of its fields (``vocab_size``, ``context_length``,
    ...).

    Raises:
        ConfigError: an unknown name, or changes that make no decoder.
    """
    return DecoderConfig.from_dict({**mini_config(name), **changes})
