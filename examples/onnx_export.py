"""Export an accelerated DenseNet to ONNX and run it with onnxruntime: the file has standard operators only."""

import pathlib
import tempfile

import onnxruntime
import torch
from torchvision.models import DenseNet

import dnl_kernels as dnl


def main():
    torch.manual_seed(0)
    model = dnl.accelerate(DenseNet(growth_rate=8, block_config=(3, 3), num_init_features=16, num_classes=10)).eval()
    images = torch.rand(2, 3, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "densenet.onnx"
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(out) - model(images)).abs().max().item()
    print(f"onnxruntime: logits {list(out.shape)}, largest difference {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
