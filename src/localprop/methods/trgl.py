"""TRGL: greedy local learning, in which a block that moves its input far is penalised.

Source: Karkar et al., Module-wise Training of Neural Networks via the Minimizing Movement Scheme, NeurIPS 2023, arXiv
2309.17357. Its loss of a module is the criterion of a linear head + 1/(2 tau) x the kinetic energy of the module's
blocks. tau is 10, as the authors' code has it for STL-10, and half as large in the first half of the modules.
"""

from types import MappingProxyType

from localprop.methods.common import Judging

_TAU = 10.0


class Trgl(Judging):
    """Greedy with a linear head and the kinetic term of `Recipe.kinetic`, 1/tau = 0.1 in the first half of the modules.

    The source sums over residual branches, of which a transformer's block has two; here a block is one step.
    """

    defaults = MappingProxyType({"head": "linear", "kinetic": 1 / _TAU})
