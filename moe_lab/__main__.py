"""``python -m moe_lab``, which is how ``torchrun -m moe_lab train`` starts the command line."""

import sys

from moe_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
