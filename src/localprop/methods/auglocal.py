"""AugLocal: greedy local learning with heads that resemble what follows.

Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024. The source cuts after
every layer and builds heads of up to nine layers; here `--head-kwargs depth=...` says how many blocks a head has.
"""

from types import MappingProxyType

from localprop.errors import ConfigError
from localprop.methods.common import Ends, Judging
from localprop.network.loss import ModuleSpec
from localprop.registry import HEADS


class AugLocal(Judging):
    """Greedy with the head `successor`, or with another that is built from the place where it stands.

    Args:
        spec: the module it is built for.
        task: see `Judging`.
        contrast: likewise.
        temperature: likewise.

    Raises:
        ConfigError: with any other head it would be greedy learning under another name.
    """

    defaults = MappingProxyType({"head": "successor"})

    def __init__(self, spec: ModuleSpec, task: Ends = (1.0, 1.0), contrast: int = 0, temperature: float = 0.07) -> None:
        if not getattr(HEADS[spec.head], "needs_place", False):
            raise ConfigError(
                f"method auglocal is its head, successor, and the head is {spec.head}; leave out head, or choose "
                "method greedy"
            )
        super().__init__(spec, task, contrast, temperature)
