"""How many bytes of tensors are alive at once, as PyTorch's own allocator counts them."""

from collections.abc import Callable

from torch.autograd.profiler import profile


def live_peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` has allocated beyond what there was before, on the CPU."""
    with profile(profile_memory=True) as found:
        run()
    events = found.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(memory, key=lambda one: one[0]):
        held += change
        most = max(most, held)
    return most
