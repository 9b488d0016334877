"""Datasets: download, parse, k-core filtering and split into the common tables."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm3.datasets.k_core import kcore
    from cm3.datasets.splits import split

__all__ = ["kcore", "split"]


def __getattr__(name: str) -> Any:
    # Lazy, because Snakemake imports cm3.datasets.registry at every parse, which does not need NumPy.
    if name == "kcore":
        from cm3.datasets.k_core import kcore

        return kcore
    if name == "split":
        from cm3.datasets.splits import split

        return split
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
