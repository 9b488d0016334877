"""MMRec folders: reader and export."""
