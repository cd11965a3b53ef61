"""The interactive viewer of molecules, used in a real browser that cannot resolve any name."""

import math

import numpy as np
import pytest
import test_book
from matplotlib.colors import to_rgb
from rdkit import Chem

from studies.data import load, to_molecule
from studies.plots.bonds import NO_RATIO, Scale, gallery
from studies.plots.viewer import THRESHOLDS, viewer

browser = test_book.browser  # the fixture

SMILES = ("CC(=O)Nc1ccc(C#N)cc1", "CCO", "O=C(O)c1ccccc1")
MOLECULES = [Chem.MolFromSmiles(smiles) for smiles in SMILES]
LAYERS, HEADS, LAYER = 4, 3, 1


def three_digits(ratios):
    """Cut by arithmetic on the decimal text, 17 digits of which are exact enough."""
    texts = [f"{ratio:.16e}" for ratio in np.ravel(ratios)]
    cut = [float(text[:4] + text[18:]) for text in texts]  # NaN is "nan"
    return np.reshape(cut, np.shape(ratios))


def some_ratios(seed=0):
    """Ratios over five decades, a bond without any and one with none in head 0."""
    random = np.random.default_rng(seed)
    ratios = [
        10 ** random.uniform(-0.5, 4.5, (LAYERS, HEADS, molecule.GetNumBonds()))
        for molecule in MOLECULES
    ]
    ratios[0][:, :, 2] = np.nan
    ratios[0][:, 0, 5] = np.nan
    # Rounding would carry the first over the threshold, and none of the others falls below.
    ratios[1][LAYER] = [[999.9999, 1000.0], [1.0, 2.0], [0.0, 1000.4]]
    return ratios


RATIOS = some_ratios()
SCALE = Scale(1.0, max(np.nanmax(three_digits(np.nan_to_num(ratio))) for ratio in RATIOS))


@pytest.fixture
def show(browser, tmp_path):
    """Opens HTML as a page; asks for nothing but the file, and has no errors."""
    opened = []

    def open_page(*fragments, **context):
        file = tmp_path / f"page{len(opened)}.html"
        text = '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
        file.write_text(text + "\n".join(fragments), encoding="utf-8")
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(10_000)
        seen = []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        opened.append((page, seen, [file.as_uri()]))
        page.goto(file.as_uri())
        return page

    yield open_page
    for page, seen, expected in opened:
        page.context.close()
        assert seen == expected


def a_viewer(**options):
    return viewer(MOLECULES, RATIOS, **dict(captions=SMILES, layer=LAYER) | options)


def control(page, name):
    return page.get_by_label(name, exact=True)


def slide(page, name, to):
    """Moves a slider as a user's drag does."""
    control(page, name).fill(str(to))


def status(page):
    return page.get_by_role("status").text_content()


def fills(figure):
    """The colours of a figure's bonds as the browser paints them, in their order."""
    found = figure.locator("[data-bond]").evaluate_all(
        "all => all.map(e => [Number(e.dataset.bond), getComputedStyle(e).fill])"
    )
    return [colour for _, colour in sorted(found)]


def outlined(figure):
    """The bonds with a dark outline as the browser paints them."""
    found = figure.locator("[data-bond]").evaluate_all(
        "all => all.filter(e => getComputedStyle(e).strokeWidth === '1.6px')"
        ".map(e => Number(e.dataset.bond))"
    )
    return sorted(found)


def shown(page):
    """The one figure that is on the screen."""
    visible = page.locator("figure:visible")
    assert visible.count() == 1
    return visible


def largest(molecule, layer, head=None):
    ratios = three_digits(RATIOS[molecule][layer])
    return np.fmax.reduce(ratios) if head is None else ratios[head]


def css(ratios, scale=SCALE):
    """The colours of ratios, written as browsers do."""
    rgb = [to_rgb(scale.colour(ratio)) for ratio in ratios]
    return ["rgb({}, {}, {})".format(*(round(255 * part) for part in colour)) for colour in rgb]


def test_each_layer_shows_its_own_colours(show):
    page = show(a_viewer())
    assert fills(shown(page)) == css(largest(0, LAYER))
    for layer in (0, 3, 2):
        slide(page, "Layer", layer)
        assert fills(shown(page)) == css(largest(0, layer))
        assert f"in layer {layer}, all heads" in status(page)
    grey = css([math.nan])[0]
    assert fills(shown(page))[2] == grey == "rgb(196, 199, 204)"
    assert to_rgb(NO_RATIO) == (196 / 255, 199 / 255, 204 / 255)


def test_each_head_shows_its_own_colours(show):
    page = show(a_viewer(heads=["first", "<i>second</i>", "third"]))
    control(page, "Head").select_option("<i>second</i>")
    assert fills(shown(page)) == css(largest(0, LAYER, head=1))
    assert status(page).endswith("in layer 1, <i>second</i>")
    control(page, "Head").select_option("first")
    assert fills(shown(page)) == css(largest(0, LAYER, head=0))
    assert fills(shown(page))[5] == css([math.nan])[0]
    control(page, "Head").select_option("all heads")
    assert fills(shown(page)) == css(largest(0, LAYER))


def test_each_threshold_counts_and_outlines_the_bonds_that_reach_it(show):
    page = show(a_viewer())
    counts = set()
    for i, threshold in enumerate(THRESHOLDS):
        slide(page, "Threshold", i)
        over = np.fmax.reduce(RATIOS[0][LAYER]) >= threshold
        text = f"{over.sum()} of {len(over)} bonds at or above {threshold:,.0f} in layer 1"
        assert status(page).startswith(text)
        assert outlined(shown(page)) == np.flatnonzero(over).tolist()
        assert control(page, "Threshold").get_attribute("aria-valuetext") == f"{threshold:,.0f}"
        assert page.locator(".threshold .now").text_content() == f"outlined from {threshold:,.0f}"
        counts.add(over.sum())
    assert len(counts) >= 3


def test_no_ratio_is_rounded_over_the_threshold(show):
    page = show(a_viewer())
    control(page, "molecule").select_option("CCO")
    control(page, "Head").select_option("head 0")
    assert status(page).startswith("1 of 2 bonds at or above 1,000")
    assert shown(page).locator("[data-bond='0'] title").text_content() == "bond 0: 999"
    control(page, "Head").select_option("head 2")
    assert status(page).startswith("1 of 2 bonds at or above 1,000")
    assert fills(shown(page)) == css([0.0, 1000.0])


def test_the_mark_of_the_threshold_stands_at_its_place_on_the_colour_bar(show):
    page = show(a_viewer(limits=(1.0, 10_000.0)))
    for threshold in (100.0, 1000.0, 10_000.0):
        slide(page, "Threshold", THRESHOLDS.index(threshold))
        line = page.locator(".threshold path").bounding_box()
        label = {100.0: "100", 1000.0: "1,000", 10_000.0: "≥ 10,000"}[threshold]
        tick = page.locator(".mapkg-bar > text").get_by_text(label, exact=True).bounding_box()
        middle = tick["x"] + tick["width"] / 2
        assert line["x"] + line["width"] / 2 == pytest.approx(middle, abs=1.5)


def test_previous_next_and_the_list_choose_the_molecule(show):
    page = show(a_viewer())
    seen = []
    for button in ("next", "next", "next", "previous"):
        page.get_by_role("button", name=f"{button} molecule").click()
        seen.append(shown(page).locator("svg").get_attribute("aria-label"))
    assert seen == [SMILES[1], SMILES[2], SMILES[0], SMILES[2]]
    assert page.locator(".place").text_content() == "3 of 3"
    assert fills(shown(page)) == css(largest(2, LAYER))
    control(page, "molecule").select_option(SMILES[1])
    assert shown(page).locator("svg").get_attribute("aria-label") == SMILES[1]
    assert fills(shown(page)) == css(largest(1, LAYER))


def test_everything_can_be_done_with_the_keyboard(show):
    page = show(a_viewer())
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.name"))
    assert names == ["previous", "molecule", "next", "layer", "head", "threshold"]
    before = THRESHOLDS.index(1000.0)
    page.keyboard.press("ArrowRight")
    assert f"at or above {THRESHOLDS[before + 1]:,.0f} in layer 1" in status(page)
    page.keyboard.press("Home")
    assert "at or above 10 in layer 1" in status(page)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowDown")
    assert "head 0" in status(page)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("End")
    assert "in layer 3, head 0" in status(page)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.locator(".place").text_content() == "3 of 3"
    assert fills(shown(page)) == css(largest(2, 3, head=0))


def test_every_control_has_a_name_and_the_text_line_is_announced(show):
    page = show(a_viewer())
    snapshot = page.locator(".mapkg-viewer").aria_snapshot()
    for line in (
        'button "previous molecule"',
        'combobox "molecule"',
        'button "next molecule"',
        'slider "Layer": "1"',
        'combobox "Head"',
        'slider "Threshold"',
        f'img "{SMILES[0]}"',
        'img "colour bar: largest activation ratio of the bond"',
    ):
        assert line in snapshot
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"


def test_two_viewers_of_a_page_do_not_touch_each_other(show):
    other = viewer(MOLECULES[1:], RATIOS[1:], limits=(1.0, 100.0), threshold=30.0)
    page = show(a_viewer(), "<p>between</p>", other, a_viewer())
    first, second, third = page.locator(".mapkg-viewer").all()
    before = [status(part) for part in (second, third)], fills(shown(third))
    slide(first, "Layer", 3)
    first.get_by_role("button", name="next molecule").click()
    control(first, "Head").select_option("head 1")
    slide(first, "Threshold", 0)
    assert ([status(part) for part in (second, third)], fills(shown(third))) == before
    assert fills(shown(first)) == css(largest(1, 3, head=1))
    assert fills(shown(second)) == css(largest(1, 0), Scale(1.0, 100.0))
    slide(second, "Layer", 2)
    assert fills(shown(second)) == css(largest(1, 2), Scale(1.0, 100.0))
    assert "in layer 3, head 1" in status(first)


def is_the_gallery(page):
    """Whether all molecules are there as given, with no control."""
    drawn = page.locator("figure:visible").all()
    assert [fills(figure) for figure in drawn] == [css(largest(m, LAYER)) for m in range(3)]
    over = [np.flatnonzero(np.fmax.reduce(ratio[LAYER]) >= 1000).tolist() for ratio in RATIOS]
    assert [outlined(figure) for figure in drawn] == over
    for figure, reached, ratio in zip(drawn, over, RATIOS, strict=True):
        count = f"{len(reached)} of {ratio.shape[2]} bonds ≥ 1,000"
        assert figure.get_by_text(count, exact=True).last.is_visible()
    assert page.get_by_text("Layer 1, all heads.").is_visible()
    assert page.get_by_text("outlined from 1,000").first.is_visible()
    for locator in (page.locator("button, select, input"), page.get_by_role("status")):
        assert not any(part.is_visible() for part in locator.all())
    return True


def test_on_paper_the_gallery_stands_in_place_of_what_was_chosen(show):
    page = show(a_viewer())
    slide(page, "Layer", 3)
    slide(page, "Threshold", 0)
    control(page, "Head").select_option("head 1")
    page.get_by_role("button", name="next molecule").click()
    assert fills(shown(page)) == css(largest(1, 3, head=1))
    page.emulate_media(media="print")
    assert is_the_gallery(page)
    assert page.locator(".threshold text:visible").all_text_contents() == ["outlined from 1,000"]
    page.emulate_media(media="screen")
    assert fills(shown(page)) == css(largest(1, 3, head=1))


def test_without_scripts_the_gallery_is_shown(show):
    assert is_the_gallery(show(a_viewer(), java_script_enabled=False))


def test_what_is_shown_without_scripts_is_the_gallery_itself():
    ratios = [largest(molecule, LAYER) for molecule in range(3)]
    plain = gallery(MOLECULES, ratios, captions=SMILES, limits=(SCALE.low, SCALE.high))
    start, end = (plain.index(mark) for mark in ('<div class="mapkg-molecules">', "\n<svg class"))
    assert plain[start:end] in a_viewer()


def test_captions_and_names_of_heads_are_never_markup(show):
    evil = '</script></title><script>document.title = "gone"</script><img src=x onerror=alert(1)>"&'
    page = show(
        viewer(MOLECULES[:1], RATIOS[:1], captions=[evil], heads=[evil, "'", "b"], label=evil)
    )
    assert page.title() == "t"
    assert page.locator("img").count() == 0
    assert shown(page).locator("figcaption").text_content().startswith(evil)
    control(page, "Head").select_option(evil)
    assert status(page).endswith(f"layer 0, {evil}")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 800])
def test_nothing_is_wider_than_the_page(show, theme, width):
    long = ["C" * 200, "a name of several words", "C"]
    page = show(a_viewer(captions=long), viewport=dict(width=width, height=600))
    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    for threshold in (0, len(THRESHOLDS) - 1):
        slide(page, "Threshold", threshold)
        assert page.evaluate(wide) == 0


def test_the_usual_page_is_below_150_kilobytes():
    molecules = [to_molecule(graph) for graph in load("moses").test[:12]]
    random = np.random.default_rng(0)
    ratios = [10 ** random.uniform(0, 4, (10, 8, m.GetNumBonds())) for m in molecules]
    captions = [Chem.MolToSmiles(molecule) for molecule in molecules]
    assert len(viewer(molecules, ratios, captions=captions).encode()) < 150_000


def test_ratios_beyond_single_precision_and_whole_numbers_survive(show):
    ratios = np.array([[[1e-45, 3.4e38]], [[7.0, 123456.0]], [[0.0123, np.nan]]])
    page = show(viewer(MOLECULES[1:2], [ratios]))
    titles = []
    for layer in range(3):
        slide(page, "Layer", layer)
        bonds = [shown(page).locator(f"[data-bond='{bond}'] title") for bond in (0, 1)]
        titles += [bond.text_content().split(": ")[1] for bond in bonds]
    large = "340" + ",000" * 12
    assert titles == ["0.0000000001", large, "7", "123,000", "0.0123", "no ratio"]


def test_a_layer_and_threshold_that_nothing_reaches_say_so(show):
    page = show(viewer(MOLECULES[1:2], [np.full((2, 1, 2), np.nan)]))
    assert status(page) == "0 of 2 bonds at or above 1,000 in layer 0, all heads"
    assert fills(shown(page)) == css([math.nan] * 2)


def test_a_molecule_without_bonds_is_shown(show):
    page = show(viewer([Chem.MolFromSmiles("C")], [np.zeros((1, 1, 0))]))
    assert status(page).startswith("0 of 0 bonds")
    assert shown(page).locator("text").all_text_contents() == ["C", "H", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ratios=RATIOS[:2]), "3 molecules, 2 values"),
        (dict(ratios=[RATIOS[0][0], *RATIOS[1:]]), r"expected ratios \[layers, heads, bonds\]"),
        (dict(ratios=[RATIOS[0], RATIOS[1][:2], RATIOS[2]]), "molecule 1.* 4 layers and 3 heads"),
        (dict(ratios=[RATIOS[0][..., 1:], *RATIOS[1:]]), r"molecule 0 \(CC.* has 12 bonds, got 11"),
        (dict(ratios=[-RATIOS[0], *RATIOS[1:]]), "molecule 0: expected finite ratios"),
        (dict(molecules=[None, *MOLECULES[1:]]), "molecule 0 cannot be drawn"),
        (dict(heads=["a"]), "3 heads and 1 names"),
        (dict(layer=4), "a layer from 0 to 3, got 4"),
        (dict(layer=-1), "a layer from 0 to 3, got -1"),
        (dict(captions=["a"]), "1 captions"),
        (dict(columns=0), "at least one column"),
        (dict(threshold=1234.0), r"expected a threshold among \(10.0, .* got 1234.0"),
        (dict(thresholds=(1000.0, 500.0)), "ascending thresholds .* got"),
        (dict(thresholds=(1000.0, 1001.0)), "at most three significant digits"),
        (dict(thresholds=(-1.0, 1000.0)), "above 0"),
        (dict(thresholds=()), "ascending thresholds"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    given = dict(molecules=MOLECULES, ratios=RATIOS, captions=SMILES) | change
    with pytest.raises(ValueError, match=message):
        viewer(given.pop("molecules"), given.pop("ratios"), **given)
