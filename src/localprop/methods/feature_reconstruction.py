"""Feature reconstruction: each module predicts the label and rebuilds its own input features.

Source: Local Learning on Transformers via Feature Reconstruction, arXiv 2212.14215. What a module receives, it must
be able to rebuild from what it gives: so little of the information that later modules need is lost on the way. The
first module's input is the image. The paper's loss weights are not published.
"""

from localprop.methods.common import Ends, Rebuilding, by_depth, contrasts
from localprop.network.loss import ModuleSpec


class FeatureReconstruction(Rebuilding):
    """task x criterion of the head's prediction + weight x reconstruction x mean squared error of the rebuilt input.

    `task` and `reconstruction` go linearly from the first module to the last but one. A term of weight 0 is left out,
    with its net.

    Args:
        spec: the module it is built for.
        weight: weight of the reconstruction.
        normalize: whether each position of the target features is normalised over channels (mean 0, variance 1),
            as masked autoencoders do with patches. Without it the error grows with the features' scale, which a
            module can lower by shrinking its output. The image is a target as it is.
        sample: part of the positions that is rebuilt, above 0 and at most 1: other random positions of each image in
            each step. Masked autoencoders (arXiv 2111.06377) learn from a part of the patches, too. It needs a decoder
            that rebuilds single positions (pixel-shuffle). Where the target's size is no whole multiple of the
            output's, a module rebuilds all positions.
        reconstruction: (first, last) factor of the reconstruction's weight.
        task: (first, last) weight of the criterion on the head's prediction.
        contrast: of how many modules, from the first, the criterion is supervised contrast.
        temperature: of the contrast.

    Raises:
        ConfigError: `sample` is not such a part, the decoder rebuilds the grid as a whole, or both terms are 0.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        weight: float = 1.0,
        normalize: bool = True,
        sample: float = 1.0,
        reconstruction: Ends = (1.0, 1.0),
        task: Ends = (1.0, 1.0),
        contrast: int = 0,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(
            spec,
            by_depth(task, spec, "task"),
            weight * by_depth(reconstruction, spec, "reconstruction"),
            normalize,
            sample,
            contrasts(contrast, spec),
            temperature,
        )
