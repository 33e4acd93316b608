"""The commands of ``moe-lab``: each module has ``add_arguments(parser)`` and ``main(args) -> exit
code``.
"""
