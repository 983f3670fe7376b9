"""A call in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Any


class Call(threading.Thread):
    """Starts at once."""

    def __init__(self, call: Callable[[], Any]):
        super().__init__(daemon=True)
        self.call, self.value, self.error = call, None, None
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:
            self.error = error
        self.over.set()

    @property
    def failed(self) -> bool:
        return self.error is not None

    def result(self) -> Any:
        """Wait for it, and return what it returns or raise what it raises."""
        self.over.wait()
        if self.error is not None:
            raise self.error
        return self.value
