"""Versions of the searches for neighbours that have one of their own, beside that of the stage. Imports no library."""

from typing import ClassVar

from cm3.common.parts import Part


class InvertedFile(Part):
    """Approximate search by `cm3.similarity.ivf`; graphs that name no version of it were made with faiss."""

    version: ClassVar[int | None] = 2
