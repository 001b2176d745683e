import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from qtune_companion.plots import COLORS, plot_confusion, plot_ledger, use_style


@pytest.fixture(autouse=True)
def closed():
    mpl.use("Agg")
    with mpl.rc_context():
        yield
    plt.close("all")


def test_style_uses_the_safe_colors():
    use_style()
    assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLORS.values())
    assert mpl.rcParams["savefig.facecolor"] == "white"


def test_confusion_writes_every_count_that_is_not_zero():
    axes = plot_confusion([[3, 0], [1, 7]], ["hide", "spy"], "predicted", "true").axes[0]
    assert sorted(t.get_text() for t in axes.texts) == ["1", "3", "7"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["hide", "spy"]
    with pytest.raises(ValueError, match=r"\(2, 2\) does not fit 3 labels"):
        plot_confusion([[3, 0], [1, 7]], ["a", "b", "c"], "", "")


def test_ledger_writes_the_totals():
    axes = plot_ledger(
        {"full": {"weights": 3 * 2**20, "adam": 6 * 2**20}, "LoRA": {"weights": 3 * 2**20}}
    ).axes[0]
    assert [t.get_text().strip() for t in axes.texts] == ["9", "3"]
