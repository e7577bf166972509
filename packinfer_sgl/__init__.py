"""packinfer-sgl: packed, prefix-grouped attention for SGLang (PackInfer, arXiv 2602.06072)."""

from pathlib import Path

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # source checkout: kernels/ and patches/ sit beside this package
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
