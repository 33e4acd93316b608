"""What routers with a free number of experts per token share: slots for all of them, or
``max_slots``.
"""

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import Router


class FreeCount(Router):
    """Base of routers whose ``top_k`` is a mean count to aim at; a token has between ``min_slots``
    and ``max_slots`` experts.
    """

    @classmethod
    def slots(cls, config: RouterConfig) -> int:
        return config.num_choices if config.max_slots is None else config.max_slots
