"""Grad-CAM (package grad-cam) on denselayer16 of an accelerated densenet121: the hooks see what they saw before."""

import numpy
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision.models import densenet121

import dnl_kernels as dnl


def main():
    torch.manual_seed(0)
    model = densenet121(weights=None).eval()  # or weights="DEFAULT"
    image = torch.rand(1, 3, 96, 96)

    def heat_map():
        with GradCAM(model=model, target_layers=[model.features.denseblock4.denselayer16]) as cam:
            return cam(input_tensor=image, targets=[ClassifierOutputTarget(281)])[0]

    before = heat_map()
    print(dnl.accelerate(model, report=True))
    after = heat_map()
    print(f"heat map {after.shape}, maximum {after.max():.3f}, difference {numpy.abs(after - before).max():.1e}")
    assert after.max() > 0 and numpy.allclose(before, after, atol=1e-3)


if __name__ == "__main__":
    main()
