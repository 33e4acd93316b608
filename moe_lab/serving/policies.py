"""Names of cache policies and placement methods: what the command line offers, without polars."""

POLICIES = ("lru", "lru_per_layer", "lfu", "static", "clairvoyant", "bound")
METHODS = ("contiguous", "greedy", "eplb", "eplb_global")
