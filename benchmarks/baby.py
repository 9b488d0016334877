"""Amazon Baby's interactions as an MMRec folder, for benchmarks/baby.yaml.

    python benchmarks/baby.py --data FOLDER --output baby
    snakemake --cores 2 --configfile benchmarks/baby.yaml -- results/pairs-ease/metrics.json

FOLDER/baby holds train.json.gz, val.json.gz and test.json.gz, {user: [items]}. Features are random: what models make of
the interactions alone can be measured with them, and nothing else.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np


def main() -> None:
    """Write baby.inter with the random 8:1:1 split of the data and text_feat.npy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("baby"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines, n_items = ["userID\titemID\tx_label"], 0
    for label, split in enumerate(("train", "val", "test")):
        for user, items in json.loads(gzip.decompress((options.data / f"baby/{split}.json.gz").read_bytes())).items():
            lines += [f"{user}\t{item}\t{label}" for item in items]
            n_items = max(n_items, *(item + 1 for item in items)) if items else n_items
    (options.output / "baby.inter").write_text("\n".join(lines) + "\n")
    features = np.random.default_rng(0).standard_normal((n_items, 384), np.float32)
    np.save(options.output / "text_feat.npy", features)


if __name__ == "__main__":
    main()
