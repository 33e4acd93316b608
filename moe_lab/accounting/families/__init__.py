"""The table of architectures, one file for each kind of layer.

``architectures.py`` gathers the ``ROWS``.
"""
