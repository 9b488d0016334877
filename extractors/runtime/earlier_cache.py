"""Caches from before release 0.2, taken over where their contents are proven to be valid.

They were named `.kept/{stem}/{address}`, and the address was a hash of the extractor's identity, a digest of the code and
the library versions. A folder is renamed only if its address equals the hash of the identity, the digest of the last code
before 0.2 (its outputs are those of version 1) and the libraries installed now. Every other folder stays where it is.
"""

import logging
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm3.common.keys import key_of
from extractors.runtime.cache import EARLIER_FOLDER
from extractors.runtime.library_versions import installed_versions

log = logging.getLogger(__name__)

_LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "open_clip_torch",
    "timm",
    "vllm",
    "pillow",
    "numpy",
    "scipy",
    "scikit-image",
)
# Backend -> digests of its extraction or captioning: of Python 3.11, then of 3.12 and later, which print syntax trees
# differently.
_DIGESTS = {
    "sentence-transformers": ("c513b9eb7c201824", "6a00214bdf0f59e7"),
    "transformers-text": ("839250adbb03bdb4", "131c67c4d5a47b73"),
    "timm": ("14977f207e7b79bc", "07993431c617f7c5"),
    "open_clip": ("aa2a48f75d163c57", "64a1a74ac0d0edc1"),
    "transformers-vision": ("3e0aa63a5743649b", "2ed5b980c137bf2a"),
    "descriptor": ("316ca9fe2fc8fd2b", "0458b13af74b835a"),
    "transformers-mllm": ("8351aff2213a06e6", "5118a9e618b03deb"),
    "transformers-caption": ("c541e8d6c256f718", "46248d3cadc65e46"),
    "vllm-caption": ("665161fedf9b05a8", "c5d55b1a9be6d01b"),
    "openai-caption": ("87a391773af1137a", "8bc63bc8a3a371d0"),
}


def earlier_addresses(backend: str, identity: dict[str, Any], code: str) -> list[str]:
    """Return the addresses at which the last code before 0.2 stored outputs that are valid now.

    Args:
        backend: name of the backend.
        identity: identity of the extractor.
        code: versions of stage and backend; nothing is valid but for version 1 of both.
    """
    if code not in (f"extract 1, {backend} 1", f"caption 1, {backend} 1"):
        return []
    libraries = {"python": platform.python_version()} | installed_versions(_LIBRARIES)
    return [key_of([identity, digest, libraries]) for digest in _DIGESTS.get(backend, ())]


def adopt_earlier(output: Path, addresses: Iterable[str], target: Path) -> None:
    """Rename the earlier cache of an output file to its present folder, if there is a valid one.

    Args:
        output: features or captions file.
        addresses: valid earlier addresses.
        target: present folder of the cached outputs; if it exists, nothing is done.
    """
    for address in addresses:
        source = output.parent / EARLIER_FOLDER / output.stem / address
        if source.is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            log.info("%s: valid, renamed to %s", source, target)
