import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from qtune_companion.plots import COLORS, SliderFigure, plot_confusion, plot_ledger, use_style


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


def _frames(n):
    return [plt.figure(figsize=(1, 1)) for _ in range(n)]


def test_slider_holds_every_frame_and_shows_one():
    shown = SliderFigure(
        _frames(3), ["2 bits", "3 bits", "<4 bits>"], "Bits", "A staircase.", "Fewer steps.", start=1
    )
    page = shown._repr_html_()
    assert page.count("<img ") == 3
    assert page.count(" hidden>") == 2
    for part in ("<output>3 bits</output>", 'alt="A staircase. &lt;4 bits&gt;"', "<p>Fewer steps.</p>"):
        assert part in page
    assert "http" not in page
    assert not plt.get_fignums()


def test_slider_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 figures and 1 labels"):
        SliderFigure(_frames(2), ["a"], "", "")
    with pytest.raises(ValueError, match="start must be 0 to 0, got 1"):
        SliderFigure(_frames(1), ["a"], "", "", start=1)
