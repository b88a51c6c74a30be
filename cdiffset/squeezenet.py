"""A perceptual distance and features for a Fréchet distance from SqueezeNet v1.0, whose ImageNet weights ship with the code.

Nothing is downloaded. The numbers are neither LPIPS (no weights were fitted to human judgement) nor FID (another network).
"""

from pathlib import Path

import numpy as np
import torch

WEIGHTS = Path(__file__).resolve().parents[1] / "assets/squeezenet/weights.npz"
CAFFE_NAMES = {"conv1x1_1": "squeeze", "conv1x1_2": "expand1x1", "conv3x3_2": "expand3x3"}
FIRES = {2: 3, 3: 4, 4: 5, 5: 7, 6: 8, 7: 9, 8: 10, 9: 12}  # number of the fire module: its place in torchvision's `features`
LEVELS = (1, 5, 10, 12)  # of `features`: the first ReLU, fire4, fire8 and fire9, the last at each resolution
BGR_MEAN = (104.0, 117.0, 123.0)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of torchvision's `squeezenet1_0().features`, float32."""
    with np.load(path) as stored:
        layers = {name.removesuffix(".bias"): stored[name] for name in stored.files if name.endswith(".bias")}
        state = {}
        for layer, bias in layers.items():
            place = "0"
            if layer != "conv1":
                fire, convolution = layer.removeprefix("fire").split("/")
                place = f"{FIRES[int(fire)]}.{CAFFE_NAMES[convolution]}"
            weight = stored[f"{layer}.values"][stored[f"{layer}.codes"]]
            state |= {f"{place}.weight": torch.from_numpy(weight), f"{place}.bias": torch.from_numpy(bias)}
    return state


class SqueezeNet(torch.nn.Module):
    def __init__(self, weights: Path = WEIGHTS):
        from torchvision.models import squeezenet1_0

        super().__init__()
        with torch.device("meta"):  # without drawing weights, which would move the global generator
            self.features = squeezenet1_0(weights=None).features.eval()
        self.features.load_state_dict(read_weights(weights), assign=True)
        self.requires_grad_(False)
        self.mean = torch.nn.Buffer(torch.tensor(BGR_MEAN).view(1, 3, 1, 1))

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] in [0, 1] => the features at LEVELS, [B, C, h, w] each."""
        features, levels = images.flip(1) * 255 - self.mean, []
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in LEVELS:
                levels.append(features)
        return levels

    def forward(self, generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
        """Distance [B] of image pairs [B, 3, H, W] in [0, 1]: Zhang et al. (CVPR 2018), equation 1 with all weights 1.

        At each level the squared difference of the features, scaled to unit length at each position, summed over the channels
        and averaged over the positions; the mean over the levels. 0 for equal images, at most 2.
        """
        distances = []
        for one, other in zip(self.levels(generated), self.levels(eo), strict=True):
            one, other = (torch.nn.functional.normalize(each, dim=1) for each in (one, other))
            distances.append((one - other).square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] => the mean of the last features over the positions, [B, 512]."""
        return self.levels(images)[-1].mean((2, 3))
