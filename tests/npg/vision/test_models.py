import pytest
import torch
from torch import nn

from npg.vision.models import KNOWN_MODELS, densenet, model_from_name, wide_resnet


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("densenet-19", 44_410),
        ("densenet-19-10", 31_170),
        ("densenet-bc-100-12", 769_162),
        ("densenet-basic-40-12", 1_019_722),
        ("wrn-16-4", 2_748_890),
        ("wrn-40-4", 8_949_210),
        ("wrn-16-8", 10_961_370),
        ("wrn-16-10", 17_116_634),
        ("wrn-28-10", 36_479_194),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(model_from_name(name)) == parameters


def test_wrn_16_1_counted_by_hand() -> None:
    # stem; per group: convolutions of two blocks, and the shortcut where the width changes; BatchNorm;
    # classifier
    stem = 27 * 16
    convolutions = 4 * 9 * 16 * 16 + (9 * 16 * 32 + 3 * 9 * 32 * 32) + (9 * 32 * 64 + 3 * 9 * 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (4 * 16 + (16 + 3 * 32) + (32 + 3 * 64) + 64)
    assert count(wide_resnet(16, 1)) == stem + convolutions + shortcuts + norms + 64 * 10 + 10


def test_densenet_19_is_the_report_s_network_of_16_weight_layers() -> None:
    layers = [m for m in densenet(19).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 16
    assert [p.shape for p in densenet(19).parameters()] == [p.shape for p in densenet(16).parameters()]
    assert layers[-1].in_features == 48


@pytest.mark.parametrize("name", ["densenet-19", "densenet-basic-10-4", "wrn-10-1", "wrn-10-1-s2"])
def test_forward_mode_and_reverse_mode_agree(name: str) -> None:
    torch.manual_seed(0)
    model = model_from_name(name, num_classes=7).double().eval()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    cotangent = torch.randn(2, 7, dtype=torch.float64)

    def forward(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, p, (images,))

    logits, pushed = torch.func.jvp(forward, (parameters,), (tangents,))
    (pulled,) = torch.func.vjp(forward, parameters)[1](cotangent)
    assert logits.shape == (2, 7)
    forward_mode = (cotangent * pushed).sum()
    reverse_mode = sum((pulled[k] * tangents[k]).sum() for k in parameters)
    torch.testing.assert_close(forward_mode, reverse_mode, rtol=1e-10, atol=1e-10)


def test_stem_of_stride_2_has_the_same_weights_and_half_the_resolution() -> None:
    model, strided = model_from_name("wrn-10-2"), model_from_name("wrn-10-2-s2")
    strided.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert model.features(images).shape == (2, 128, 8, 8)
    assert strided.features(images).shape == (2, 128, 4, 4)
    stem = strided.features[0](images)
    torch.testing.assert_close(stem, model.features[0](images)[:, :, ::2, ::2])


def test_known_models_can_all_be_built() -> None:
    with torch.device("meta"):
        assert all(count(model_from_name(name)) > 0 for name in KNOWN_MODELS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wide_resnet(18, 10), "no depth 18; the nearest legal ones are 16 and 22"),
        (lambda: wide_resnet(4, 10), "no depth 4; the nearest legal ones are 10 "),
        (lambda: densenet(29), "no depth 29; the nearest legal ones are 28 and 31"),
        (lambda: densenet(7), "no depth 7; the nearest legal ones are 10 "),
        (lambda: densenet(41, bottleneck=False), "nearest legal ones are 40 and 43"),
        (lambda: densenet(19, growth_rate=0), "growth_rate must be at least 1; got 0"),
        (lambda: densenet(19, compression=1.5), r"compression must be in \(0, 1\]"),
        (lambda: wide_resnet(16, 0), "widen_factor must be at least 1; got 0"),
        (lambda: wide_resnet(16, 1, stem_stride=0), "stem_stride must be at least 1; got 0"),
        (lambda: wide_resnet(16, 1, num_classes=0), "num_classes must be at least 1; got 0"),
        (lambda: wide_resnet(16, 1, dropout=1.0), "dropout must be a probability"),
        (lambda: model_from_name("wrn-16"), "unknown model 'wrn-16': did you mean wrn-16-"),
        (lambda: model_from_name("resnet-50"), "Names are densenet-DEPTH"),
        (lambda: model_from_name("wrn-18-10"), "nearest legal ones are 16 and 22"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
