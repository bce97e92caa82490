"""scripts/figures/cifar_curves.py: the bold line of several seeds. Its pictures are tested in test_train_cifar.py."""

from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(load) -> ModuleType:
    return load("figures", "cifar_curves")


def test_the_middle_of_runs_is_the_median_where_all_of_them_are(script: ModuleType) -> None:
    runs = [
        script.Curve("net", "sgd", "test", [1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [50.0, 70.0, 60.0]),
        script.Curve("net", "sgd", "test", [1.0, 2.0], [14.0, 28.0], [40.0, 75.0]),
        script.Curve("net", "sgd", "test", [1.0, 2.0, 3.0], [11.0, 25.0, 39.0], [45.0, 60.0, 90.0]),
    ]
    expected = script.Curve("net", "sgd", "test", [1.0, 2.0], [11.0, 25.0], [45.0, 70.0])
    assert script.middle(runs) == expected
    assert script.middle(runs[:1]) == runs[0]


def test_the_moving_average(script: ModuleType) -> None:
    assert script.smooth([2.0, 4.0], 0.5) == pytest.approx([2.0, (0.5 * 2 + 4) / 1.5])
    assert script.smooth([3.0, 1.0], 0.0) == [3.0, 1.0]


@pytest.mark.parametrize(("dataset", "title"), [(None, "net"), ("My images", "net, My images")])
def test_the_labels(script: ModuleType, dataset: str | None, title: str, tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(script, "save", lambda figure, out: drawn.append(figure))
    script.draw([script.Curve("net", "sgd", "test", [1.0, 2.0], [1.0, 2.0], [50.0, 70.0])], tmp_path, dataset, 0.0)
    left, _ = drawn[0].axes
    assert left.get_title(loc="left") == title
    assert left.get_ylabel() == "test accuracy (%)"
