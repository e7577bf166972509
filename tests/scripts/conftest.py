import sys
from pathlib import Path

# the scripts are no package: they import their neighbours by name
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
