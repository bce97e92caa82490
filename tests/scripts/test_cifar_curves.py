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


def test_curves_of_others_are_thin_in_the_panels_of_their_kind(script: ModuleType, tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(script, "save", lambda figure, out: drawn.append(figure))
    own = [script.Curve("wrn-16-1", "sgd", "test", [1.0, 2.0], [10.0, 20.0], [50.0, 70.0])]
    others = [
        script.Curve("wrn-18-10", "sgd", "test", [1.0, 2.0], [100.0, 200.0], [55.0, 75.0]),
        script.Curve("densenet-19", "sgd", "test", [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]),
    ]
    script.draw(own, tmp_path, None, 0.0, others)
    left, right, above = drawn[0].axes
    assert [list(line.get_ydata()) for line in left.lines] == [[50.0, 70.0], [50.0, 70.0], [55.0, 75.0]]
    assert [list(line.get_xdata()) for line in above.lines] == [[100.0, 200.0]]
    assert [list(line.get_xdata()) for line in right.lines] == [[10.0, 20.0]] * 2


def test_runs_that_have_no_mean_and_pictures_of_no_kind_are_refused(script: ModuleType, tmp_path, capsys) -> None:
    folders = []
    for name in ("test", "validation"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.yaml").write_text(f"model: wrn-16-1\noptimizer: sgd\neval_on: {name}\n")
        (folders[-1] / "metrics.csv").write_text(f"epoch,seconds,{name}_top1\n1,10,50\n")
    out = tmp_path / "curves.png"
    assert script.main([*map(str, folders), "--out", str(out)]) == 2
    assert "wrn-16-1 with sgd were measured on test and on validation images" in capsys.readouterr().err
    assert script.main([str(folders[0]), "--out", str(tmp_path / "curves")]) == 2
    assert "must be the name of a picture that ends with .png" in capsys.readouterr().err
    assert not out.exists()
    assert script.main([str(folders[0]), "--out", str(out)]) == 0
    assert out.exists()


def test_the_longest_known_name_of_an_optimizer_ends_a_run_of_a_csv(script: ModuleType, tmp_path) -> None:
    lines = [f"densenet-19-{name}/1,valid_prec,{i},{100 + i},50" for name in ("online-ngd", "ngd") for i in range(2)]
    path = tmp_path / "curves.csv"
    path.write_text("\n".join(["run,tag,step,wall_time,value", *lines]))
    assert [(c.model, c.optimizer) for c in script.read(path)] == [
        ("densenet-19", "online-ngd"),
        ("densenet-19", "ngd"),
    ]


def test_the_table_has_means_over_runs_and_the_first_epochs_of_their_median(script: ModuleType) -> None:
    accuracies = ([50.0, 66.0, 71.0, 76.0, 74.0, 73.0], [54.0, 58.0, 73.0, 78.0, 76.0, 77.0])
    epochs, seconds = [float(n) for n in range(1, 7)], [10.0, 20.0, 30.0, 90.0, 100.0, 110.0]
    curves = [script.Curve("wrn-16-1", "sgd", "test", epochs, seconds, values) for values in accuracies]
    other = script.Curve("wrn-18-10", "sgd", "test", epochs, seconds, [0.0, 91.0, 92.0, 93.0, 94.0, 90.0])
    line = script.table(curves, [other]).splitlines()[-1]
    expected = "| wrn-16-1 | sgd | 2 | 77.00 | 75.00 | 72.20 | 2, 3, 4, –, –, – | 10 | 94.00, 92.00 |"
    assert line == expected  # 72.20 is (72 + 72.4) / 2; the fourth epoch's 60 s were a pause
    assert script.table(curves).splitlines()[0].endswith("| seconds per epoch |")
