"""What the tests of `accelerate` compare: everything that evaluation or a step of training can see."""

import torch

from dnl_kernels.testing import relative_error


@torch.no_grad()
def randomise(model, seed=0):
    """Values that hide nothing: no gamma of 1, no zero weight, no statistics of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            tensor.copy_(draw + 0.5 if "running_var" in name or tensor.dim() == 1 and name.endswith("weight")
                         else (draw - 0.5) / max(1, tensor[0].numel()) ** 0.5 * 2)  # fmt: skip
    return model


def draws_like(x, count):
    """Inputs drawn at once: `everything` seeds the generator."""
    return list(torch.randn(count, *x.shape, dtype=x.dtype))


def everything(model, x, seed=5):
    """Output, every gradient by its name, and every buffer afterwards."""
    torch.manual_seed(seed)  # of dropout
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.backward(torch.linspace(-3, 3, out.numel(), dtype=out.dtype).view_as(out).sin())
    found = {"output": out.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected, tolerance=1e-9):
    """In float64, by the largest number; None in the same places. What is zero but for rounding may be rounding."""
    assert found.keys() == expected.keys()
    floor = 1e-4 * max(float(t.abs().max()) for t in expected.values() if t is not None)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            scale = max(float(value.abs().max()), floor) if value.numel() else 1.0
            error = float((found[name].double() - value.double()).abs().max()) if value.numel() else 0.0
            assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def assert_as_good(draws, epsilon):
    """In a narrower dtype, against float64: draws of (found, eager, exact). The medians of their errors, for one draw
    is luck: at most twice that of eager PyTorch and a few roundings. The budget of a gradient is that of the worst one:
    some are sums that cancel, where either side may be the lucky one."""
    groups = {}
    for name, value in draws[0][2].items():
        if value is None or not value.is_floating_point():
            continue
        errors = [(relative_error(f[name], e[name]), relative_error(g[name], e[name])) for f, g, e in draws]
        ours, eager = (sorted(error)[len(error) // 2] for error in zip(*errors, strict=True))
        if eager < 0.3:  # else zero but for rounding
            groups.setdefault("gradient" if name.startswith("gradient") else name, []).append((ours, eager, name))
    for group in groups.values():
        ours, _, name = max(group)
        eager = max(eager for _, eager, _ in group)
        assert ours <= 2 * (eager + 4 * epsilon), f"{name}: error {ours:.1e}, eager {eager:.1e}"
