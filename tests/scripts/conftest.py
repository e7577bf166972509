import sys
from pathlib import Path

# the scripts are no package: they import their neighbours by name
SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
