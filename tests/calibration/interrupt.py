"""A pass over blocks that is killed on the way."""

from dataclasses import dataclass

from aptq.api import Callback


class Interrupted(Exception):
    pass


@dataclass
class Interrupt(Callback):
    """Stops a backward pass at its n-th block; counts those that were begun."""

    at: int = -1
    begun: int = 0

    def on_advance(self, *, stage: str, done: float, detail: str) -> None:
        assert stage == "gradients"
        if self.begun == self.at:
            raise Interrupted
        self.begun += 1
