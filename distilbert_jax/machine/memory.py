"""Keep the memory that an update gives back, for the next one."""

import ctypes

# Of glibc's malloc.h. An option is a C int; -1 is the largest size_t.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Let glibc keep freed memory in this process, instead of giving it back to the kernel.

    Each update on a CPU takes and frees hundreds of megabytes. Given back, they come as new pages
    that the kernel has to clear first, which took a sixth of the processor time of a fine-tuning.
    One arena for all threads, because others give theirs back whatever is said; a tokenizer with
    many threads is slower for it. To be called before JAX starts its threads; where the C library
    is not glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
        mallopt(option, value)
