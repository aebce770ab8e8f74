"""Time step() against torch.optim and the streaming limit: ``stepforge bench`` as a script."""

import sys

from stepforge.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
