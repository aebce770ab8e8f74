"""Times step() against torch.optim and the streaming limit: ``stepforge bench`` as a script."""

import sys

from stepforge.cli import make_app

if __name__ == "__main__":
    make_app()(["bench", *sys.argv[1:]])
