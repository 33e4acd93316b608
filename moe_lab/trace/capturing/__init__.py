"""Routing decisions from a model as it makes them: hooks on its routers (``recorder.capture``), a
pretrained model over a corpus (``hub``), and a Trainer's callback (``callback``).
"""
