"""The viewer of molecules: its drawings, and itself in a browser that cannot resolve any name."""

import itertools
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rdkit import Chem

from studies import viewer as study
from studies.data import load, molecule_graph, to_molecule

SMILES = ("CC(=O)Nc1ccc(C#N)cc1", "CCO", "O=C(O)c1ccccc1")
MOLECULES = [Chem.MolFromSmiles(smiles) for smiles in SMILES]
LAYERS, HEADS, LAYER = 4, 3, 0


def three_digits(ratios):
    """Cut by arithmetic on the decimal text, 17 digits of which are exact enough."""
    texts = [f"{ratio:.16e}" for ratio in np.ravel(ratios)]
    cut = [float(text[:4] + text[18:]) for text in texts]  # NaN is "nan"
    return np.reshape(cut, np.shape(ratios))


RANDOM = np.random.default_rng(0)
RATIOS = [10 ** RANDOM.uniform(-0.5, 4.5, (LAYERS, HEADS, m.GetNumBonds())) for m in MOLECULES]
"""Over five decades; a bond has none, and one has none in head 0."""
RATIOS[0][:, :, 2] = RATIOS[0][:, 0, 5] = np.nan
# Rounding would carry the first over the threshold, and none of the others falls below.
RATIOS[1][LAYER] = [[999.9999, 1000.0], [1.0, 2.0], [0.0, 1000.4]]
SCALE = study.Scale(1.0, max(np.nanmax(three_digits(np.nan_to_num(ratio))) for ratio in RATIOS))


def drawn(molecule, ratios, high=10_000.0, caption="a"):
    """The figure of one molecule, and from each bond to its band."""
    text = study.figures(
        [molecule], [np.asarray(ratios, float)], [caption], study.Scale(1.0, high), 1000.0
    )
    (figure,) = ElementTree.fromstring(text).iter("figure")
    bands = {int(path.get("data-bond")): path for path in figure.iter() if path.get("data-bond")}
    return figure, bands


def test_the_colors_of_a_scale_change_at_its_bounds_and_a_greater_ratio_is_darker():
    scale = study.Scale(1.0, 10_000.0)
    assert len(scale.bounds) == study.LEVELS - 1
    for i, bound in enumerate(scale.bounds):
        assert scale.color(np.nextafter(bound, 0)) == study.COLORS[i]
        assert scale.color(bound) == study.COLORS[i + 1]
        assert bound == pytest.approx(10 ** (4 * (i + 1) / study.LEVELS))
    assert scale.color(0.0) == scale.color(1.0) == study.COLORS[0]
    assert scale.color(1e9) == scale.color(10_000.0) == study.COLORS[-1]
    light = np.array([to_rgb(color) for color in study.COLORS]) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all()


def test_bonds_from_the_threshold_on_are_outlined_counted_and_above_the_others():
    figure, bands = drawn(Chem.MolFromSmiles("c1ccccc1"), [10_000, 3000, 1000, 100, np.nan, 1])
    assert list(bands) == [3, 4, 5, 0, 1, 2]
    looks = {bond: path.get("class") for bond, path in bands.items()}
    assert looks == {3: None, 4: "none", 5: None, **dict.fromkeys(range(3), "outlined")}
    assert bands[4].get("fill") == study.NO_RATIO
    assert figure.find("svg/desc").text == "3 of 6 bonds ≥ 1,000"


def test_the_band_of_a_bond_is_where_its_atoms_are():
    for graph in load("moses").test[:5]:
        molecule = to_molecule(graph)
        _, bands = drawn(molecule, np.ones(molecule.GetNumBonds()))
        corners = {
            bond: np.array(path.get("d").strip("MZ").replace("L", " ").split(), float)
            for bond, path in bands.items()
        }
        for first, second in itertools.combinations(molecule.GetBonds(), 2):
            atoms = [{b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in (first, second)]
            a, b = (corners[bond.GetIdx()].reshape(-1, 2) for bond in (first, second))
            gap = np.linalg.norm(a[:, None] - b[None], axis=-1).min()
            # Bands of bonds with a common atom share a corner, others have none in common.
            assert (gap < 0.15) == bool(atoms[0] & atoms[1])


def test_a_molecule_of_one_atom_is_its_letters_and_one_that_cannot_be_drawn_is_named():
    figure, bands = drawn(Chem.MolFromSmiles("C"), [])
    assert bands == {}
    assert [text.text for text in figure.iter("text")] == ["C", "H", "4"]
    unkekulizable = Chem.MolFromSmiles("c1cccc1", sanitize=False)
    for molecule, message in (
        (None, "molecule 0 cannot be drawn: expected a molecule with atoms, got None"),
        (unkekulizable, "molecule 0 cannot be drawn, says RDKit: Can't kekulize"),
        (MOLECULES[1], r"molecule 0 \(a\) has 2 bonds, got 5 values"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(molecule, np.ones(5))
    with pytest.raises(ValueError, match="3 molecules, 3 ratios and 1 captions"):
        a_viewer(captions=["a"])


def test_a_molecule_is_drawn_with_its_notes_and_is_not_changed():
    molecule = to_molecule(molecule_graph("CC#N"))
    _, (plain, noted) = plt.subplots(1, 2)
    study.draw_molecule(molecule, plain)
    study.draw_molecule(molecule, noted, atom_notes=["0", "1", "2"], bond_notes=["1", "3"])
    images = [np.asarray(ax.images[0].get_array())[..., :3] for ax in (plain, noted)]
    inked = [image.min(axis=2) < image.max() for image in images]
    assert 0 < inked[0].sum() < inked[1].sum()
    for ink in inked:  # within a margin of eight pixels there is nothing but white, and then ink
        assert not (ink[:8].any() or ink[-8:].any() or ink[:, :8].any() or ink[:, -8:].any())
        assert ink[8].any() and ink[-9].any() and ink[:, 8].any() and ink[:, -9].any()
    assert not molecule.GetAtomWithIdx(0).HasProp("atomNote")


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
    return study.viewer(MOLECULES, RATIOS, **dict(captions=SMILES) | options)


def control(page, name):
    return page.get_by_label(name, exact=True)


def status(page):
    return page.get_by_role("status").text_content()


def fills(figure):
    """The colors of a figure's bonds as the browser paints them, in their order."""
    found = figure.locator("[data-bond]").evaluate_all(
        "all => all.map(e => [Number(e.dataset.bond), getComputedStyle(e).fill])"
    )
    return [color for _, color in sorted(found)]


def outlined(figure):
    """The bonds with a dark outline as the browser paints them."""
    is_dark = "all => all.filter(e => getComputedStyle(e).strokeWidth === '1.6px')"
    return sorted(
        figure.locator("[data-bond]").evaluate_all(f"{is_dark}.map(e => Number(e.dataset.bond))")
    )


def shown(page):
    """The one figure that is on the screen."""
    visible = page.locator("figure:visible")
    assert visible.count() == 1
    return visible


def largest(molecule, layer, head=None):
    ratios = three_digits(RATIOS[molecule][layer])
    return np.fmax.reduce(ratios) if head is None else ratios[head]


def css(ratios):
    """The colors of ratios, written as browsers do."""
    rgb = [to_rgb(SCALE.color(ratio)) for ratio in ratios]
    return ["rgb({}, {}, {})".format(*(round(255 * part) for part in color)) for color in rgb]


def test_each_molecule_layer_head_and_threshold_shows_its_own_colors_and_outlines(show):
    page = show(a_viewer())
    assert fills(shown(page)) == css(largest(0, LAYER))
    counts = set()
    for i, threshold in enumerate(study.THRESHOLDS):
        control(page, "Threshold").fill(str(i))
        over = np.fmax.reduce(RATIOS[0][LAYER]) >= threshold
        text = f"{over.sum()} of {len(over)} bonds at or above {threshold:,.0f} in layer 0"
        assert status(page).startswith(text)
        assert outlined(shown(page)) == np.flatnonzero(over).tolist()
        assert page.locator(".threshold .now").text_content() == f"outlined from {threshold:,.0f}"
        counts.add(over.sum())
    assert len(counts) >= 3
    for layer in (1, 3, 2):
        control(page, "Layer").fill(str(layer))
        assert fills(shown(page)) == css(largest(0, layer))
        assert f"in layer {layer}, all heads" in status(page)
    control(page, "Head").select_option("head 0")
    assert fills(shown(page)) == css(largest(0, 2, head=0))
    assert fills(shown(page))[5] == css([np.nan])[0] == "rgb(196, 199, 204)"
    control(page, "Head").select_option("all heads")
    page.get_by_role("button", name="previous molecule").click()
    assert page.locator(".place").text_content() == "3 of 3"
    assert fills(shown(page)) == css(largest(2, 2))
    control(page, "molecule").select_option(SMILES[1])
    assert shown(page).locator("svg").get_attribute("aria-label") == SMILES[1]


def test_no_ratio_is_rounded_over_the_threshold_and_extreme_ones_survive(show):
    page = show(a_viewer())
    control(page, "molecule").select_option("CCO")
    control(page, "Head").select_option("head 0")
    assert status(page).startswith("1 of 2 bonds at or above 1,000")
    assert shown(page).locator("[data-bond='0'] title").text_content() == "bond 0: 999"
    control(page, "Head").select_option("head 2")
    assert status(page).startswith("1 of 2 bonds at or above 1,000")
    ratios = np.array([[[1e-45, 3.4e38]], [[7.0, 123456.0]], [[0.0123, np.nan]]])
    page = show(study.viewer(MOLECULES[1:2], [ratios], captions=["CCO"]))
    large = "340" + ",000" * 12
    texts = [("0.0000000001", large), ("7", "123,000"), ("0.0123", "no ratio")]
    for layer, expected in enumerate(texts):
        control(page, "Layer").fill(str(layer))
        for bond, text in enumerate(expected):
            title = shown(page).locator(f"[data-bond='{bond}'] title")
            assert title.text_content() == f"bond {bond}: {text}"


def test_everything_can_be_done_with_the_keyboard_and_has_a_name(show):
    page = show(a_viewer())
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.name"))
    assert names == ["previous", "molecule", "next", "layer", "head", "threshold"]
    for key in ("ArrowRight", "Shift+Tab", "ArrowDown", "Shift+Tab", "End", "Shift+Tab", "Enter"):
        page.keyboard.press(key)
    over = f"{study.THRESHOLDS[study.THRESHOLDS.index(1000.0) + 1]:,.0f}"
    assert status(page).endswith(f"at or above {over} in layer 3, head 0")
    assert fills(shown(page)) == css(largest(1, 3, head=0))
    snapshot = page.locator(".mapkg-viewer").aria_snapshot()
    names = ('button "previous molecule"', 'slider "Layer": "3"', 'slider "Threshold"')
    pictures = (f'img "{SMILES[1]}"', 'img "color bar: largest activation ratio of the bond"')
    assert all(line in snapshot for line in names + pictures)


def test_a_finger_finds_every_control_and_a_screen_reader_hears_which_molecule_it_is(show):
    page = show(a_viewer(), viewport=dict(width=420, height=850), has_touch=True)
    controls = page.locator(".mapkg-viewer").locator("button, select, input").all()
    assert len(controls) == 6
    for each in controls:
        box = each.bounding_box()
        assert min(box["width"], box["height"]) >= 44, each.get_attribute("name")
    page.get_by_role("button", name="next molecule").tap()
    heard = page.locator("[aria-live=polite]").all_text_contents()
    assert heard == ["2 of 3", status(page)]


def test_on_paper_and_without_scripts_all_molecules_stand_in_place_of_what_was_chosen(show):
    first, second = a_viewer(), a_viewer()
    page = show(first, second)
    one, other = page.locator(".mapkg-viewer").all()
    before = status(other), fills(shown(other))
    control(one, "Layer").fill(str(3))
    one.get_by_role("button", name="next molecule").click()
    assert fills(shown(one)) == css(largest(1, 3))
    assert (status(other), fills(shown(other))) == before, "two viewers of a page"
    printed, plain = show(a_viewer()), show(a_viewer(), java_script_enabled=False)
    control(printed, "Layer").fill("3")
    printed.emulate_media(media="print")
    over = [np.flatnonzero(np.fmax.reduce(ratio[LAYER]) >= 1000).tolist() for ratio in RATIOS]
    for page in (printed, plain):
        drawn = page.locator("figure:visible").all()
        assert [fills(figure) for figure in drawn] == [css(largest(m, LAYER)) for m in range(3)]
        assert [outlined(figure) for figure in drawn] == over
        assert page.get_by_text("Layer 0, all heads.").is_visible()
        for locator in (page.locator("button, select, input"), page.get_by_role("status")):
            assert not any(part.is_visible() for part in locator.all())


def test_captions_are_never_markup_and_nothing_is_wider_than_the_page(show):
    evil = '</script></title><script>document.title = "gone"</script><img src=x onerror=alert(1)>"&'
    captions = [evil, "C" * 200, "C"]
    page = show(a_viewer(captions=captions), viewport=dict(width=320, height=600))
    assert (page.title(), page.locator("img").count()) == ("t", 0)
    assert shown(page).locator("figcaption").text_content().startswith(evil)
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0


def test_the_usual_page_is_below_150_kilobytes():
    molecules = [to_molecule(graph) for graph in load("moses").test[:12]]
    random = np.random.default_rng(0)
    ratios = [10 ** random.uniform(0, 4, (10, 8, m.GetNumBonds())) for m in molecules]
    captions = [Chem.MolToSmiles(molecule) for molecule in molecules]
    assert len(study.viewer(molecules, ratios, captions=captions).encode()) < 150_000
