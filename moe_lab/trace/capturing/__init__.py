"""Routing decisions from a model as it makes them: hooks on its routers (``recorder.capture``), and
a pretrained model over a corpus (``hub``).
"""
