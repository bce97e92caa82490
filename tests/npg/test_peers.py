"""The same matrices from curvlinops, where it has them."""

import math

import pytest
import torch
from torch import nn

from npg import Fisher, KroneckerFisher, families

curvlinops = pytest.importorskip("curvlinops")
pytestmark = pytest.mark.usefixtures("double")


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=True)[0].mean(1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (6, 3)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
        ),
        (6, 2, 3, 3),
    ),
    "attention": (lambda: Attention(3), (6, 2, 4)),
}
# the family, curvlinops' loss of the same curvature when summed, and its labels
LOSSES = {
    "categorical": (families.Categorical(), nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(3, (6,))),
    "bernoulli": (
        families.Bernoulli(),
        nn.BCEWithLogitsLoss(reduction="sum"),
        lambda: torch.randint(2, (6, 3)).double(),
    ),
    # Σ(y − η)² is the negative log-likelihood of variance ½
    "gaussian": (families.Gaussian(variance=0.5), nn.MSELoss(reduction="sum"), lambda: torch.randn(6, 3)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    return build(), torch.randn(shape)


@pytest.mark.parametrize("loss", LOSSES)
def test_exact_is_the_generalised_gauss_newton_matrix(network, loss, assert_close):
    model, x = network
    family, theirs, labels = LOSSES[loss]
    fisher = Fisher(model, x, family)
    peer = curvlinops.GGNLinearOperator(model, theirs, list(model.parameters()), [(x, labels())])
    V = torch.randn(fisher.shape[0], 3)
    assert_close(fisher @ V, peer @ V / 6)
    assert_close(fisher @ V[:, 0], peer @ V[:, 0] / 6)


@pytest.mark.parametrize("loss", LOSSES)
def test_empirical(network, loss, assert_close):
    model, x = network
    family, theirs, labels = LOSSES[loss]
    y = labels()
    fisher = Fisher(model, x, family, kind="empirical", targets=y)
    peer = curvlinops.EFLinearOperator(model, theirs, list(model.parameters()), [(x, y)])
    V = torch.randn(fisher.shape[0], 3)
    assert_close(fisher @ V, peer @ V / 6)


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_agrees_in_expectation(loss):
    """Each against the exact matrix, within five standard errors of the mean over independent draws."""
    torch.manual_seed(0)
    model, x = NETWORKS["mlp"][0](), torch.randn(6, 3)
    family, theirs, labels = LOSSES[loss]
    data, generator = [(x, labels())], torch.Generator().manual_seed(0)
    exact = Fisher(model, x, family)
    v = torch.randn(exact.shape[0])
    mine, peers = [], []
    for draw in range(60):
        options = {"kind": "sampled", "samples": 20, "generator": generator, "linearization": exact.linearization}
        mine.append(Fisher(model, x, family, **options) @ v)
        peer = curvlinops.FisherMCLinearOperator(
            model, theirs, list(model.parameters()), data, mc_samples=20, seed=draw, check_deterministic=False
        )
        peers.append(peer @ v / 6)
    for draws in (torch.stack(mine), torch.stack(peers)):
        error = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - exact @ v).abs() <= 5 * error + 1e-12).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_kronecker_factors(name, loss, corrected, assert_close):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model, x = build(), torch.randn(shape)
    if name == "convolution":  # a normalisation has no factors there
        model[1] = nn.Identity()
    family, theirs, labels = LOSSES[loss]
    mine = KroneckerFisher(Fisher(model, x, family), probes=None, corrected=corrected)
    make = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    peer = make(
        model,
        theirs,
        list(model.parameters()),
        [(x, labels())],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
    )
    V = torch.randn(mine.shape[0], 3)
    assert_close(mine @ V, peer @ V / 6)
