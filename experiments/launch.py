"""What every file here begins with: the package of this clone is found, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distilbert_jax.commands.main import run as run  # noqa: E402
