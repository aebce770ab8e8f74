"""Makes the scripts of examples/ and docs/ importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("examples", "experiments"):
    sys.path.insert(0, str(ROOT / folder))
