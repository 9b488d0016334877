"""The stages of the pipeline: the module of each, the version of what it computes and the libraries behind it.

A stage's version is raised by hand when it gives another output for the same settings and inputs; golden outputs in
`tests/golden/` hold it honest. What depends on one model, backend or source has a version of its own (`cm3.common.parts`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        module: what `python -m` runs.
        version: of the outputs, not of the code: messages, logs and speed do not count.
        libraries: distributions whose versions the stage's record names, besides those of the parts that it runs.
    """

    module: str
    version: int
    libraries: tuple[str, ...] = ()


STAGES = {
    "generate": Stage("cm3.datasets.sample.generate", 1, ("numpy", "pillow")),
    "download": Stage("cm3.datasets.download.stage", 1),
    "prepare": Stage("cm3.datasets.prepare", 1, ("duckdb", "numpy", "pyarrow")),
    "split": Stage("cm3.datasets.label", 1, ("numpy", "pyarrow")),
    "reviews": Stage("cm3.datasets.reviews", 1, ("pyarrow",)),
    "user-groups": Stage("cm3.datasets.user_groups", 1, ("numpy", "pyarrow")),
    "images": Stage("cm3.datasets.images.stage", 1, ("pillow", "pyarrow")),
    "extract": Stage("extractors.extract", 1, ("numpy", "pyarrow")),
    "caption": Stage("extractors.caption.stage", 1, ("pyarrow",)),
    "reduce": Stage("extractors.reduce", 1, ("numpy", "pyarrow", "torch")),
    "control": Stage("extractors.control", 1, ("numpy", "pyarrow")),
    "similarity": Stage("cm3.similarity.stage", 1, ("numpy", "pyarrow", "torch")),
    "train": Stage("cm3.training.train", 1, ("numpy", "pyarrow", "scipy", "torch")),
    "train-baseline": Stage("cm3.baselines.train", 1, ("numpy", "pyarrow", "scipy", "torch")),
    "rerank": Stage("cm3.evaluation.rerank_stage", 1, ("numpy", "pyarrow", "scipy", "torch")),
    "external": Stage("cm3.evaluation.external_stage", 1, ("numpy", "pyarrow", "scipy")),
    "evaluate": Stage("cm3.evaluation.evaluate", 1, ("numpy", "pyarrow", "scipy", "torch")),
    "publish": Stage("workflow.publish", 1, ("snakemake",)),
    "compare": Stage("cm3.reports.analysis.compare", 4, ("numpy", "pyarrow", "scipy")),
    "experiment-page": Stage("cm3.reports.pages.experiment_page", 2, ("matplotlib", "pillow")),
    "study-page": Stage("cm3.reports.pages.study_page", 3, ("matplotlib",)),
    "mmrec": Stage("cm3.datasets.mmrec.export", 1),
    "mmrec-vectors": Stage("cm3.datasets.mmrec.export_vectors", 1, ("numpy", "pyarrow")),
}
