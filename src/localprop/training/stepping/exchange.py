"""What processes exchange in the middle of a step."""

from typing import Protocol

from localprop.network.carry import Carry


class Exchange(Protocol):
    """What a process exchanges with its neighbours in the middle of a step, where heads read ahead."""

    def give_back(self, carry: Carry) -> None:
        """Takes the gradient off a batch that the head of the module before has for it, and sends it back."""

    def hand_on(self, carry: Carry) -> None:
        """Sends a batch to the next process, and waits for what the head of the last module here has for it.

        The batch then has that gradient, its scale, and all of the module's loss.
        """

    def settle(self) -> None:
        """Returns when what was given back is taken."""
