"""Memory of training: what a user can do about too little of it, and when it is released."""

from cm3.common.usage import return_free_memory
from cm3.config import Training
from cm3.model.network import Network
from cm3.training.adam import Adam


def memory_hint(settings: Training) -> str:
    """Return what a user can do about too little memory for training."""
    steps = [f"lower training.batch_size (now {settings.batch_size})"]
    if settings.precision != "bfloat16":
        steps.append("set training.precision to bfloat16, which halves the features")
    if settings.optimizer_state == "memory" and settings.device in ("auto", "cpu"):
        steps.append("on the CPU, set training.optimizer_state to disk")
    if settings.batches_per_step != 1:
        steps.append(f"lower training.batches_per_step (now {settings.batches_per_step})")
    return f"{', or '.join(steps)}, or use a device with more memory; the same command resumes from the last checkpoint"


def release_gradients(model: Network, optimiser: Adam) -> None:
    """Release the gradients, and give the memory of large ones back to the system."""
    optimiser.zero_grad()
    if model.is_large():
        return_free_memory()
