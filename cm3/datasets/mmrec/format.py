"""File format of the MMRec toolbox: file and column names, for reading and export."""

USER, ITEM, RATING, TIME, LABEL = "userID", "itemID", "rating", "timestamp", "x_label"
"""Columns of {name}.inter, as MMRec's preprocessing writes them; the last three are optional. USER and ITEM are also the
columns of numbers in the mappings and in the metadata."""

ITEM_ID, USER_ID = "asin", "user_id"
"""Columns of original ids in the mappings, as the export writes them."""

ITEM_MAPPING, USER_MAPPING = "i_id_mapping.csv", "u_id_mapping.csv"
"""Files that map numbers to original ids, tab-separated."""


def interactions_file(name: str) -> str:
    """Return the name of the interactions of a dataset."""
    return f"{name}.inter"


def metadata_file(name: str) -> str:
    """Return the name of the item metadata of a dataset, comma-separated."""
    return f"meta-{name}.csv"


def vectors_file(modality: str) -> str:
    """Return the name of the vectors of a modality."""
    return f"{modality}_feat.npy"
