"""``python -m frobdecay``: look into checkpoints, merge factors in them; see ``cli``."""

import sys

from frobdecay.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
