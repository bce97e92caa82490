"""The optimizers of others: Muon on the weights of a network of convolutions, and what is said where one is lacking."""

import copy
import io

import pytest
import torch
from torch import nn

from npg.vision import rivals
from npg.vision.config import load_config
from npg.vision.optimizers import make_optimizer


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    return net.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        g = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(6, 3, 4, 4, generator=g)), torch.arange(6) % 3).backward()
        optimizer.step()


def test_muon_is_that_of_pytorch_on_weights_and_adam_on_the_rest() -> None:
    net, twin = model(), model()
    ours = rivals.Muon(net.parameters(), 0.1, 0.6, 0.01, vector_lr=0.02)
    shapes = [(4, 27), None, None, (3, 16), None]
    flat = [nn.Parameter(p.detach().reshape(s)) for p, s in zip(twin.parameters(), shapes) if s]
    rest = [p for p, s in zip(twin.parameters(), shapes) if not s]
    theirs = [torch.optim.Muon(flat, 0.1, momentum=0.6, weight_decay=0.01), torch.optim.Adam(rest, 0.02)]
    for seed in range(5):
        train(net, ours, range(seed, seed + 1))
        with torch.no_grad():
            for p, m in zip([twin[0].weight, twin[3].weight], flat, strict=True):
                p.copy_(m.view(p.shape))
        twin.zero_grad()
        g = torch.Generator().manual_seed(seed)
        nn.functional.cross_entropy(twin(torch.randn(6, 3, 4, 4, generator=g)), torch.arange(6) % 3).backward()
        for p, m in zip([twin[0].weight, twin[3].weight], flat, strict=True):
            m.grad = p.grad.reshape(m.shape)
        for each in theirs:
            each.step()
    want = [flat[0].view(4, 3, 3, 3), *rest[:2], flat[1], rest[2]]
    assert all(torch.equal(p, q.view(p.shape)) for p, q in zip(net.parameters(), want, strict=True))


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo"])
def test_they_resume_bit_for_bit_with_a_schedule(name: str) -> None:
    if name != "muon":
        pytest.importorskip("pytorch_optimizer")

    def start() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        net = model()
        optimizer = make_optimizer(name, net, {"lr": 0.02, "weight_decay": 0.01})
        return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def go(net, optimizer, scheduler, steps):
        for seed in steps:
            train(net, optimizer, range(seed, seed + 1))
            scheduler.step()

    straight, first, resumed = start(), start(), start()
    go(*straight, range(24))
    go(*first, range(13))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    go(*resumed, range(13, 24))
    assert all(torch.equal(p, q) for p, q in zip(resumed[0].parameters(), straight[0].parameters(), strict=True))
    assert not torch.equal(straight[0][0].weight, copy.deepcopy(model())[0].weight)


@pytest.mark.parametrize("name", ["soap", "shampoo", "muon"])
def test_what_is_not_installed_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "pytorch_optimizer", None)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=rf"^{name} .*install"):
        load_config("wrn-10-1", name, "small")


def test_a_copy_of_muon_goes_on() -> None:
    net = model()
    optimizer = rivals.Muon(net.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train(net, optimizer, range(2))
    twin, copied = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(twin, copied, range(2, 4))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
