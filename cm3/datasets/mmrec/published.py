"""Fingerprints of the files that MMRec's authors publish: whether a file on disk is one of them."""

import logging
from pathlib import Path

from cm3.common.files import sha256_of
from cm3.datasets.mmrec.format import ITEM_MAPPING, USER_MAPPING, interactions_file, vectors_file

log = logging.getLogger("cm3.datasets.mmrec.published")

FINGERPRINTS = {
    "baby": {
        interactions_file("baby"): (4_362_239, "e0abb033ea5cc538bb2becd8c3dc50b619f28f7974ba61f5ed11ce27cf405940"),
        ITEM_MAPPING: (111_702, "c56ff96cd1f703b6dc8ac4469856a856019ec1577ac243508e3d253f80878bb6"),
        USER_MAPPING: (392_164, "a80850b8b46008e3bceabdc7ab72ab6e3620616394709daed7d12dc499626b60"),
        vectors_file("text"): (10_828_928, "6667f2ad655c9ecc97cb3383f58988864ef51ec0b39c158b15986c66769f2dc4"),
        vectors_file("image"): (231_014_528, "36c3be592b98506189a7d5de71b21577cf626f0293b539d861534673b3e9fd70"),
    },
    "microlens": {interactions_file("microlens"): (21_354_300, "bdc0bda6725e")},
}
"""Dataset -> file -> its size in bytes, and its sha256 or the first digits of it."""


def published_files(interactions: Path) -> dict[str, bool]:
    """Return whether each file of a folder, of those whose fingerprints are known, is the published one; log it.

    Args:
        interactions: the folder's {name}.inter; the files of other names have no fingerprints.
    """
    name = interactions.name.removesuffix(".inter")
    found = {
        file: _is_published(interactions.with_name(file), *fingerprint)
        for file, fingerprint in FINGERPRINTS.get(name, {}).items()
        if interactions.with_name(file).is_file()
    }
    for file, same in found.items():
        if same:
            log.info("%s: is the file that MMRec's authors publish", interactions.with_name(file))
        else:
            log.warning(
                "%s: is not the file that MMRec's authors publish as %s of %s; results on it are not comparable with "
                "published ones",
                interactions.with_name(file),
                file,
                name,
            )
    return found


def _is_published(path: Path, size: int, digits: str) -> bool:
    return path.stat().st_size == size and sha256_of(path).startswith(digits)
