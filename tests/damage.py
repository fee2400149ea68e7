"""What may be wrong with files, for tests of whatever reads and writes them."""

import resource
from contextlib import contextmanager


class Attack:
    """In a pickle that is loaded without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DAMAGES = {
    "cut short": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"garbage" * 9,
    "empty": lambda content: b"",
}
