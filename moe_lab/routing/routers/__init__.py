"""Every router: the class of ``RouterConfig(kind="top_p")`` is in ``top_p.py``, with its formula
and paper on top. ``ROUTERS`` imports a file when its kind is first built; the facts of all kinds
are the rows of ``moe_lab.routing.built_in_routers``.
"""
