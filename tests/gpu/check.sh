#!/usr/bin/env bash
# Checks the pipeline on a GPU in some four minutes and prints a Markdown table; docs/gpu.md says where to send it.
# CM3_CHECK_DEVICE=cpu tries the script itself on a machine without one, on tiny data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="$PWD/.venv/bin:$PATH"
exec python tests/gpu/check.py
