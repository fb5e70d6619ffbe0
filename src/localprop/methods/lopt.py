"""LoPT: modules before the last rebuild their input alone, slowly; the label trains the last.

Source: LoPT (arXiv 2605.04913), for language models that have been trained before: the label's loss on early layers
costs what they know. There K is 2.
"""

from types import MappingProxyType

from localprop.errors import ConfigError
from localprop.methods.common import Rebuilding
from localprop.network.loss import ModuleSpec


class Lopt(Rebuilding):
    """weight x mean squared error of the rebuilt input, at a part of the learning rate, without a head.

    Args:
        spec: the module it is built for.
        rate: times which the learning rate of the module's share of the backbone is, above 0 and at most 1; the
            decoder learns at the rate itself.
        weight: of the reconstruction.
        normalize: see `FeatureReconstruction`.
        sample: likewise.

    Raises:
        ConfigError: a rate or a weight with which a module would learn nothing.
    """

    defaults = MappingProxyType({"reach": 0})

    def __init__(
        self, spec: ModuleSpec, rate: float = 0.1, weight: float = 1.0, normalize: bool = True, sample: float = 1.0
    ) -> None:
        if not 0 < rate <= 1:
            raise ConfigError(
                f"method lopt: rate is {rate:g}; it must be above 0 and at most 1; to learn nothing, freeze"
            )
        super().__init__(spec, 0.0, weight, normalize, sample)
        self.rate = rate
