"""Galleries of molecules show each bond's ratio, on one scale."""

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from rdkit import Chem

from studies.data import load, to_molecule
from studies.plots import bonds
from studies.plots.bonds import COLOURS, LEVELS, NO_RATIO, Scale

ETHANOL, BENZENE = (Chem.MolFromSmiles(smiles) for smiles in ("CCO", "c1ccccc1"))
BENZENE_RATIOS = np.array([1.0, 10.0, 100.0, 1000.0, 3000.0, 10_000.0])


@pytest.fixture(scope="module")
def graphs():
    return load("moses").test[:200]


def gallery(molecules, values, **options):
    """The gallery of values given as lists."""
    return bonds.gallery(molecules, [np.asarray(value, float) for value in values], **options)


def read(text):
    """The gallery as a tree: it is well-formed XML too."""
    return ElementTree.fromstring(text)


def bands(figure):
    """From bond to the element of its band."""
    found = {int(path.get("data-bond")): path for path in figure.iter() if path.get("data-bond")}
    return dict(sorted(found.items()))


def colours(text):
    """Per molecule the colours of its bonds in their order."""
    return [[p.get("fill") for p in bands(f).values()] for f in read(text).iter("figure")]


def level(ratio, low, high):
    """Which of the steps of equal size on the logarithmic axis a ratio is in."""
    position = np.log10(ratio / low) / np.log10(high / low)
    return int(np.clip(np.floor(position * LEVELS), 0, LEVELS - 1))


def test_a_bond_has_the_colour_map_s_colour_for_its_ratio():
    ratios = np.array([1.2, 7.0, 90.0, 1100.0, 5000.0, 20_000.0])
    (drawn,) = colours(gallery([BENZENE], [ratios]))
    shades = matplotlib.colormaps["inferno_r"](np.linspace(0.02, 0.58, LEVELS))
    expected = [to_hex(shades[level(ratio, 1.0, 20_000.0)]) for ratio in ratios]
    assert drawn == expected
    assert len(set(drawn)) == 6


def test_the_colours_of_a_scale_change_at_its_bounds_and_nowhere_else():
    scale = Scale(1.0, 10_000.0)
    assert len(scale.bounds) == LEVELS - 1
    for i, bound in enumerate(scale.bounds):
        assert scale.colour(np.nextafter(bound, 0)) == COLOURS[i]
        assert scale.colour(bound) == COLOURS[i + 1]
        assert bound == pytest.approx(10 ** (4 * (i + 1) / LEVELS))
    assert scale.colour(0.0) == scale.colour(1.0) == COLOURS[0]
    assert scale.colour(1e9) == scale.colour(10_000.0) == COLOURS[-1]


def test_a_greater_ratio_is_darker_in_even_steps():
    # The lightness of CIELAB, from linear sRGB.
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    steps = -np.diff(lightness)
    assert (steps > 0.4).all()
    assert (steps < 1.6).all()


def test_the_same_ratio_has_the_same_colour_in_every_molecule():
    text = gallery([ETHANOL, BENZENE], [[100.0, 10_000.0], BENZENE_RATIOS])
    first, second = colours(text)
    assert first == [second[2], second[5]]


def test_the_scale_reaches_the_largest_ratio_of_all_molecules_or_the_threshold():
    small, large = np.array([2.0, 3.0]), np.array([4.0, 50_000.0])
    assert colours(gallery([ETHANOL] * 2, [small, large]))[1][1] == COLOURS[-1]
    drawn = colours(gallery([ETHANOL], [small], threshold=100.0))[0]
    assert drawn == [COLOURS[level(ratio, 1.0, 100.0)] for ratio in small]
    given = colours(gallery([ETHANOL], [small], limits=(2.5, 2.9)))[0]
    assert given == [COLOURS[0], COLOURS[-1]]


def test_a_tensor_is_drawn_as_an_array_is():
    ratios = torch.tensor([5.0, 2000.0])
    assert bonds.gallery([ETHANOL], [ratios]) == gallery([ETHANOL], [[5.0, 2000.0]])


def test_bonds_from_the_threshold_on_are_outlined_and_counted():
    figure = next(read(gallery([BENZENE], [BENZENE_RATIOS])).iter("figure"))
    looks = [path.get("class") for path in bands(figure).values()]
    assert looks == [None, None, None, "outlined", "outlined", "outlined"]
    assert figure.find("svg/desc").text == "3 of 6 bonds ≥ 1,000"
    assert figure.find("figcaption/small").text == "3 of 6 bonds ≥ 1,000"


def test_outlined_bonds_are_drawn_above_the_others():
    figure = next(read(gallery([BENZENE], [BENZENE_RATIOS[::-1]])).iter("figure"))
    order = [int(path.get("data-bond")) for path in figure.iter() if path.get("data-bond")]
    assert order == [3, 4, 5, 0, 1, 2]


def test_a_bond_without_a_ratio_is_grey_and_explained_at_the_colour_bar():
    text = gallery([ETHANOL], [[np.nan, 2000.0]])
    (figure,) = read(text).iter("figure")
    none, outlined = bands(figure).values()
    assert (none.get("fill"), none.get("class")) == (NO_RATIO, "none")
    assert outlined.get("class") == "outlined"
    assert "1 of 2 bonds" in figure.find("svg/desc").text
    assert "no ratio" in text
    assert "no ratio" not in gallery([ETHANOL], [[1.0, 2000.0]])


def test_a_picture_of_nothing_but_gaps_is_drawn():
    assert colours(gallery([ETHANOL], [[np.nan, np.nan]])) == [[NO_RATIO, NO_RATIO]]


def test_a_threshold_that_nothing_reaches_is_at_the_end_of_the_colour_bar():
    tree = read(gallery([ETHANOL], [[1.0, 2.0]], threshold=1e5))
    (mark,) = (group for group in tree.iter("g") if group.get("class") == "threshold")
    assert mark.get("transform") == "translate(262.0)"
    assert mark.find("text").text == "outlined from 100,000"
    assert next(tree.iter("desc")).text == "0 of 2 bonds ≥ 100,000"


def test_the_colour_bar_has_the_colours_in_order_and_the_threshold_in_its_place():
    tree = read(gallery([ETHANOL], [[1.0, 10_000.0]], label="ratio <r>"))
    bar = next(svg for svg in tree.iter("svg") if svg.get("class") == "mapkg-bar")
    fills = [path.get("fill") for path in bar.iter("path") if path.get("fill")]
    assert fills == list(COLOURS)
    texts = {text.text: text for text in bar.iter("text")}
    assert list(texts)[:5] == ["≤ 1", "10", "100", "1,000", "≥ 10,000"]
    assert "ratio <r>" in texts
    (mark,) = (group for group in bar.iter("g") if group.get("class") == "threshold")
    # 1000 is three of the four decades from 30, where the bar starts, to 262.
    assert mark.get("transform") == "translate(204.0)"
    assert float(texts["1,000"].get("x")) == 204.0


def test_a_bar_over_many_decades_has_no_more_ticks_than_there_is_room_for():
    tree = read(gallery([ETHANOL], [[1.0, 1e14]]))
    bar = next(svg for svg in tree.iter("svg") if svg.get("class") == "mapkg-bar")
    ticks = [float(t.get("x")) for t in bar.iter("text") if t.get("y") == "48"]
    assert ticks[0] == 30
    assert 4 <= len(ticks) <= 6


def test_bands_touch_where_their_bonds_share_an_atom(graphs):
    molecule = to_molecule(graphs[0])
    number = molecule.GetNumBonds()
    figure = next(read(gallery([molecule], [np.ones(number)])).iter("figure"))
    corners = {
        bond: np.array(path.get("d").strip("MZ").replace("L", " ").split(), float).reshape(-1, 2)
        for bond, path in bands(figure).items()
    }
    assert list(corners) == list(range(number))
    for first in molecule.GetBonds():
        for second in molecule.GetBonds():
            atoms = [{b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in (first, second)]
            a, b = corners[first.GetIdx()], corners[second.GetIdx()]
            gap = np.linalg.norm(a[:, None] - b[None], axis=-1).min()
            # Bands of bonds with a common atom share a corner, others have none in common.
            assert (gap < 0.15) == bool(atoms[0] & atoms[1])


def test_a_bond_is_a_pair_of_edges_in_the_order_of_the_graph(graphs):
    for graph in graphs:
        molecule = to_molecule(graph)
        pairs = [{b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in molecule.GetBonds()]
        for both in (graph.edge_index[:, 0::2], graph.edge_index[:, 1::2]):
            assert pairs == [set(edge) for edge in both.t().tolist()]


def test_double_bonds_are_those_of_the_graph(graphs):
    """Kekulising anew for the picture gives the bond types that the model saw."""
    for graph in graphs[:20]:
        molecule = to_molecule(graph)
        number = molecule.GetNumBonds()
        figure = next(read(gallery([molecule], [np.ones(number)])).iter("figure"))
        ink = next(group for group in figure.iter("g") if group.get("class") == "ink")
        strokes = sum(path.get("d").count("M") for path in ink.iter("path"))
        # RDKit draws as many lines as the order says, and a joint at some of the atoms.
        lines = int(graph.edge_attr[0::2].sum())
        assert lines <= strokes <= lines + graph.num_nodes


def test_a_molecule_of_one_atom_is_its_letters():
    figure = next(read(gallery([Chem.MolFromSmiles("C")], [[]])).iter("figure"))
    assert bands(figure) == {}
    assert [text.text for text in figure.iter("text")] == ["C", "H", "4"]


def test_captions_are_shown_as_they_are_and_name_the_picture():
    caption = "<b>a & \"b\"</b></svg><script>alert('x')</script>"
    tree = read(gallery([ETHANOL], [[1.0, 2.0]], captions=[caption]))
    (figure,) = tree.iter("figure")
    assert figure.find("figcaption").text == caption
    assert figure.find("svg").get("aria-label") == caption
    assert figure.find("svg").get("role") == "img"
    assert figure.find("svg/title").text == caption
    assert list(tree.iter("script")) == []
    default = read(gallery([ETHANOL] * 2, [[1.0, 2.0]] * 2)).iter("figcaption")
    assert [caption.text for caption in default] == ["molecule 0", "molecule 1"]


def test_a_gallery_loads_nothing_and_has_no_identifiers_to_clash():
    text = gallery([ETHANOL], [[1.0, 2.0]], columns=3)
    assert not {"href", "src", "id"} & {name for e in read(text).iter() for name in e.attrib}
    assert "url(" not in text
    assert "@import" not in text
    assert read(text).get("style") == "--columns:3"


def test_the_molecule_that_was_given_is_not_changed():
    molecule = Chem.MolFromSmiles("c1ccccc1")
    before = molecule.ToBinary()
    gallery([molecule], [BENZENE_RATIOS])
    assert molecule.ToBinary() == before


def test_as_many_values_as_bonds_are_expected():
    with pytest.raises(ValueError, match=r"molecule 1 \(second\) has 6 bonds, got 5 values"):
        gallery([ETHANOL, BENZENE], [[1, 2], np.ones(5)], captions=["first", "second"])


@pytest.mark.parametrize(
    ("molecules", "values", "options", "message"),
    [
        ([], [], {}, "at least one molecule"),
        ([ETHANOL], [], {}, "1 molecules, 0 values"),
        ([ETHANOL], [[1, 2]], dict(captions=["a", "b"]), "2 captions"),
        ([ETHANOL], [[1, 2]], dict(columns=0), "at least one column"),
        ([ETHANOL], [[[1, 2]]], {}, r"molecule 0: expected ratios \[bonds\], got shape \(1, 2\)"),
        ([ETHANOL], [[1, -2]], {}, "molecule 0: expected finite ratios.* from -2"),
        ([ETHANOL], [[1, np.inf]], {}, "molecule 0: expected finite ratios.* to inf"),
        ([ETHANOL], [[1, 2]], dict(threshold=0.0), "a threshold above 0, got 0"),
        ([ETHANOL], [[1, 2]], dict(threshold=np.nan), "a threshold above 0, got nan"),
        ([ETHANOL], [[1, 2]], dict(limits=(10.0, 10.0)), "0 < low < high, got 10.0 and 10.0"),
        ([ETHANOL], [[1, 2]], dict(limits=(0.0, 10.0)), "0 < low < high"),
    ],
)
def test_what_does_not_fit_together_is_refused(molecules, values, options, message):
    with pytest.raises(ValueError, match=message):
        gallery(molecules, values, **options)


@pytest.mark.parametrize(
    ("molecule", "message"),
    [
        (None, "expected a molecule with atoms, got None"),
        (Chem.Mol(), "expected a molecule with atoms, got none"),
        (Chem.MolFromSmiles("c1cccc1", sanitize=False), "says RDKit: Can't kekulize"),
        (Chem.MolFromSmiles("C(C)(C)(C)(C)C", sanitize=False), "says RDKit: .*valence"),
    ],
)
def test_a_molecule_that_cannot_be_drawn_is_named(molecule, message):
    with pytest.raises(ValueError, match=f"molecule 1 cannot be drawn.*{message}"):
        gallery([ETHANOL, molecule], [np.ones(2), np.ones(5)])
