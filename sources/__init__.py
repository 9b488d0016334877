"""Where data come from: download, parse, k-core and split into the common tables.

`sources.kcore` and `sources.split` are functions. The stage of the same name, `python -m sources.split`, is only
ever run, never imported, so that it cannot take the function's place here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sources.cores import kcore
    from sources.splits import split

__all__ = ["kcore", "split"]


def __getattr__(name: str) -> Any:
    # Lazy, because Snakemake imports sources.config at every parse and needs no NumPy for that.
    if name == "kcore":
        from sources.cores import kcore

        return kcore
    if name == "split":
        from sources.splits import split

        return split
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
