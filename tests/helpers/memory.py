"""The memory of a process: what it holds at once, without pages of files that it maps."""

import ctypes
import gc
import threading

M_MMAP_THRESHOLD = -3  # of malloc.h


def give_back_at_once() -> None:
    """Let the C library give freed memory back, which it would keep for later."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def allocated():
    """Bytes of this process's own memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


class Peak(threading.Thread):
    """The most that a process has allocated inside the block, beyond what it had before."""

    def __enter__(self):
        gc.collect()
        self.before = self.most = allocated()
        self.ended = threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, allocated())

    def settle(self):
        """Let the thread see what is held now."""
        self.ended.wait(0.05)

    def __exit__(self, *_):
        self.ended.set()
        self.join()
        self.bytes = self.most - self.before
