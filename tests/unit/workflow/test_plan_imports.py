"""What planning a run imports: each start of Snakemake pays for it, and each job on a cluster."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "scipy", "sklearn", "transformers", "sentence_transformers", "skimage", "duckdb", "matplotlib")


def test_planning_imports_no_library_of_the_stages():
    source = (ROOT / "workflow/rules/common.smk").read_text()
    imports = re.findall(r"^from (?:cm3|workflow)\S* import (?:\([^)]*\)|.*)$", source, re.MULTILINE)
    assert len(imports) > 10
    code = "\n".join(
        [
            *imports,
            "import sys, yaml",
            "load_config(yaml.safe_load(open('config/config.yaml')))",
            f"found = sorted(set({HEAVY}) & set(sys.modules))",
            "assert not found, found",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
