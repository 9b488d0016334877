"""What `tests/gpu/check.sh` runs: one row per check, with seconds, the floor they are compared with, and memory.

The checks run in a second process. If one of them fails, the process ends, because an error of CUDA leaves it useless, and
a new one goes on with the next check. A check that crashes the process or exceeds its time is a row, too.
"""

import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure import DEVICE, ROOT, TINY, Found
from training_rows import SHARES, gpu_tests, graphed_step, killed_and_resumed, same_metrics, shared, step
from training_rows import WIDTHS as IMAGE_WIDTHS

from cm3.common.device import select_device

LIMIT = 90.0  # seconds of a check
FAILED = 3  # exit status of the second process after a check that failed
Check = Callable[[], Found]


def checks() -> dict[str, Check]:
    """Return the checks by name, in order."""
    import extraction_rows as extraction
    import search_rows as search

    device = DEVICE.type
    architecture, n_images, image_batch = ("ViT-S-32-alt", 8, 4) if TINY else ("ViT-B-32", 4096, 256)
    n_texts, text_batch = (16, 8) if TINY else (50_000, 512)
    scale, n_pairs, pair_batch = (1, 6, 3) if TINY else (16, 512, 64)
    found: dict[str, Check] = {"recall@10 of a small shop, mean of seeds": same_metrics}
    for width in IMAGE_WIDTHS:
        for precision in ("float32", "tf32", "bfloat16"):
            found[f"step of CM3, images {width}-d, {precision}"] = lambda width=width, precision=precision: step(
                width, precision
            )
    found |= {
        f"step of CM3 as a CUDA graph, images {width}-d": lambda width=width: graphed_step(width)
        for width in IMAGE_WIDTHS
    }
    found |= {
        f"10 exact neighbours of {search.ROWS:,} x {width}": lambda width=width: search.neighbours(width)
        for width in search.WIDTHS
    }
    return found | {
        f"top 50 of {search.ROWS:,} items for {search.EVALUATED:,} users": search.evaluation,
        f"extraction of {n_images:,} images by {architecture}": lambda: extraction.images(
            architecture, n_images, image_batch, device
        ),
        f"extraction of {n_texts:,} texts by MiniLM": lambda: extraction.texts(n_texts, text_batch, device),
        f"extraction of {n_pairs:,} images with a prompt by a small Qwen2.5-VL": lambda: extraction.multimodal(
            scale, n_pairs, pair_batch, device
        ),
        "training killed and resumed": killed_and_resumed,
        f"{SHARES} trainings on one GPU": shared,
        "tests marked gpu": lambda: gpu_tests(LIMIT - 5),
    }


def row(check: str, found: str, compared: str = "", memory: str = "") -> str:
    """Return a row of the table."""
    return f"| {check} | {found} | {compared} | {memory} |".replace("\n", " ")


def run_from(first: int) -> None:
    """Run checks and print their rows, up to the first one that fails."""
    for name, check in list(checks().items())[first:]:
        try:
            found, compared = check()
        except Exception as error:  # the row and the traceback show any fault; the next check runs in a new process
            traceback.print_exc()
            print(row(name, f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"), flush=True)
            os._exit(FAILED)  # destructors of a broken CUDA context may hang
        memory = ""
        if DEVICE.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(row(name, found, compared, memory), flush=True)


def run_all(names: Sequence[str], command: Sequence[str], limit: float = LIMIT) -> int:
    """Print the rows of all checks, each of which may end the process that runs it; return how many failed.

    Args:
        names: of the checks.
        command: prints the rows of all checks from a number on, which is its last argument.
        limit: seconds of a check.
    """
    done = failed = 0
    while done < len(names):
        process = subprocess.Popen(
            [*command, str(done)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
        while done < len(names):
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                os.killpg(process.pid, 9)
                line = row(names[done], f"FAILED: not finished after {limit:.0f} s")
            if line is None:  # the end of the output without a row: the process has crashed
                line = row(names[done], f"FAILED: exit status {process.wait()}")
            print(line, flush=True)
            done += 1
            if "| FAILED: " in line:
                failed += 1
                break
        process.wait()
    return failed


def _forward(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout or ():
        if line.startswith("| "):
            lines.put(line.rstrip("\n"))
    lines.put(None)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        run_from(int(sys.argv[1]))
        return
    select_device(DEVICE.type, "CM3_CHECK_DEVICE")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, tiny data"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print("| check | found | to compare with | peak MB |\n|---|---|---|---|", flush=True)
    sys.exit(run_all(list(checks()), [sys.executable, __file__]) > 0)


if __name__ == "__main__":
    main()
