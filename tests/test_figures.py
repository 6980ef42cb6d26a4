"""Figures: what is drawn is what was measured, on any text, in colours and words that everybody can read."""

import dataclasses
import itertools
import math
import warnings
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image
from study_data import make_capture, make_language, make_study

import pico_helpers as pico

SENTENCE = "The cat saw the dog and the dog saw the cat."


def maps_of(figure):
    """The heatmaps of a figure, the colour bar left out: values with NaN where nothing is drawn."""
    meshes = [axes.collections[0] for axes in figure.axes if axes.collections and axes.get_label() != "<colorbar>"]
    return [np.ma.filled(mesh.get_array().astype(float), np.nan) for mesh in meshes]


def words_of(figure):
    return " ".join([text.get_text() for text in figure.findobj(matplotlib.text.Text)]).replace("\n", " ")


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_rollout_is_the_known_number_and_multiplies_layers_in_order():
    rollout = pico.attention_rollout(pico.uniform_attention(8, 20))
    assert rollout[-1, 0] == pytest.approx(0.53, abs=0.005) and np.all(np.triu(rollout, 1) == 0)
    np.testing.assert_allclose(rollout.sum(axis=1), 1)
    one_back = np.eye(4, k=-1) + np.diag([1, 0, 0, 0])  # layer 0 looks one back, layer 1 two back
    two_back = np.eye(4, k=-2) + np.diag([1, 1, 0, 0])
    rollout = pico.attention_rollout(np.stack([one_back, two_back])[:, None])
    np.testing.assert_allclose(rollout, (two_back + np.eye(4)) / 2 @ (one_back + np.eye(4)) / 2)


def test_maps_show_the_weights_and_nothing_where_a_token_cannot_look():
    captures, heads = [make_capture(text, n_layer=3, n_head=2) for text in (SENTENCE, "Short one.")], [(0, 0), (2, 1)]
    figure, sheet = pico.plot_chosen_heads(captures[0], heads[1:]), pico.plot_category(captures, heads)
    (values,), (tiles,) = maps_of(figure), maps_of(pico.plot_all_heads(captures[0]))
    n, weights = len(values), captures[0].weights[2, 1].numpy()
    np.testing.assert_allclose(values, np.where(np.tri(n), weights, np.nan))
    assert to_rgb(figure.axes[0].get_facecolor()) == to_rgb("#d5d5d5")
    assert {"·dog", "·dog²", "·the³"} <= set(labels_of(figure.axes[0].yaxis))  # each label names one position
    assert "L2H1" in words_of(figure) and "token that looks" in words_of(figure)
    assert tiles.shape == (3 * n, 2 * n)
    np.testing.assert_allclose(tiles[2 * n :, n:], values)
    for shown, (capture, head) in zip(maps_of(sheet), itertools.product(captures, heads), strict=True):
        np.testing.assert_allclose(np.nan_to_num(shown), capture.weights[head].numpy(), atol=1e-7)


def test_chosen_heads_are_the_strongest_of_each_kind_and_shown_with_their_own_class_and_score():
    study, capture = make_study(3, 3), make_capture(SENTENCE, 3, 3)
    scores, heads = study.scores.set_index(["layer", "head"]), pico.choose_heads(study.scores)
    assert {scores[kind].idxmax() for kind in ("previous", "local", "induction")} == set(heads[:3])
    assert len(set(pico.choose_heads(study.scores, 9))) == 9
    assert len(pico.choose_heads(make_study(1, 2).scores)) == 2  # a model with fewer heads
    kinds = dict(zip(pico.HEAD_CLASSES, ("previous", "local", "induction", "broad"), strict=False))
    for plot in (pico.plot_chosen_heads, pico.plot_attention_flow):
        words = words_of(plot(capture, heads, study.scores))
        for head, name in scores["class"][heads].items():
            score = f"{kinds[name]} {scores.at[head, kinds[name]]:.2f}"
            assert f"{pico.head_name(*head)} {pico.CLASS_LABELS[name]} {score}" in words
        with pytest.raises(pico.PicoError, match="There is no L7H0; layers are 0-2, heads 0-2"):
            plot(capture, [(7, 0)])
        for other, name in ((["L0H1"], "'L0H1'"), ((0, 1), "0"), ([[0, 1]], r"\[0, 1\]")):
            with pytest.raises(pico.PicoError, match=rf"There is no {name}: pass pairs, as \[\(0, 0\)\]; layers"):
                plot(capture, other)


def test_long_sentences_are_cut_and_the_picture_says_so():
    capture = make_capture(" ".join(["word another"] * 35))
    n, heatmap = len(capture.labels), pico.plot_chosen_heads(capture, [(0, 0)])
    assert n > 60 and maps_of(heatmap)[0].shape == (40, 40)
    assert f"First 40 of {n} tokens" in words_of(heatmap) and f"First 40 of {n}" in words_of(pico.plot_rollout(capture))
    flow = pico.plot_attention_flow(capture, [(0, 0)])
    assert f"First 20 of {n} tokens" in words_of(flow) and len(labels_of(flow.axes[0].yaxis)) == 20


def test_attention_graph_keeps_the_strongest_looks():
    weights = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.45, 0.15, 0.4, 0], [0.3, 0.32, 0.0, 0.38]])
    graph = pico.attention_graph(weights, "abcd", max_edges=2)
    edges = {(i, j): w for i, j, w in graph.edges(data="weight")}
    assert edges == {(1, 0): 0.9, (2, 0): 0.45, (2, 2): 0.4, (3, 3): 0.38, (3, 1): 0.32}  # (3, 0) would be a third
    assert "".join(dict(graph.nodes(data="label")).values()) == "abcd"
    assert pico.attention_graph(pico.uniform_attention(1, 9)[0, 0], "abcdefghi").number_of_edges() == 0


@pytest.mark.parametrize("head", [(0, 0), (0, 1)])  # of many rings, of many arrows
def test_flow_draws_an_arrow_for_each_look_at_another_token_and_a_ring_for_each_at_itself(head):
    capture = make_capture(SENTENCE)
    graph = pico.attention_graph(capture.weights[head], capture.labels)
    (axes,) = pico.plot_attention_flow(capture, [head]).axes
    assert len(axes.patches) == sum(i != j for i, j in graph.edges)
    rings = [graph.has_edge(i, i) for i in graph]
    np.testing.assert_array_equal(axes.collections[-1].get_sizes() > 0, rings)
    assert sum(rings) > 5 if head == (0, 0) else len(axes.patches) > 5
    evenly = capture._replace(weights=pico.uniform_attention(2, len(capture.labels)))
    (axes,) = pico.plot_attention_flow(evenly, [(0, 0)]).axes
    assert not axes.patches and not len(axes.get_xticks()), "without arrows there is no axis either"


@pytest.mark.parametrize(
    "text", ["日本語のテキスト", "I ❤️ 🎉🎉 parties", "cost $x$ and $\\frac{1}{0$", "\x00\x1b bell", "שלום مرحبا", "a"]
)
def test_any_text_is_drawn_without_a_warning(text, tmp_path):
    capture, heads = make_capture(text), [(0, 0), (1, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing glyphs, formulas that do not parse
        for _, _, plot, *data in pico.sentence_pictures([capture], heads, None):
            pico.save_figure(figure := plot(*data), tmp_path / "figure", svg=False)
    title = figure.get_suptitle().replace(r"\$", "$").replace("\n", " ")
    assert "$" not in text or text in title  # the dollar is shown, not read as a formula


VISION = [  # Machado et al. 2009, severity 1, on linear RGB: protanopia, deuteranopia
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
]
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]


def lab(color, vision):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(np.clip(TO_XYZ @ np.clip(vision @ linear, 0, 1) / (0.95047, 1, 1.08883), 1e-6, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_differ_for_every_reader_stand_out_from_white_and_mean_one_thing():
    pairs = itertools.combinations(pico.CLASS_COLORS.values(), 2)
    for (a, b), vision in itertools.product(pairs, [np.eye(3), *VISION]):
        assert np.linalg.norm(lab(a, vision) - lab(b, vision)) > 20, f"{a} and {b}"  # of 100 from black to white
    colors = [*pico.CLASS_COLORS.values(), *pico.MODEL_COLORS.values()]
    assert all(lab(color, np.eye(3))[0] <= 61.6 for color in [*colors, pico.GREY])  # a contrast of 3:1
    assert len(set(colors)) == len(colors) and tuple(pico.CLASS_COLORS) == pico.HEAD_CLASSES


def test_loss_curve_leaves_out_what_was_not_measured():
    losses = (10.8, None), (9.0, math.nan), (8.0, 8.5)
    rows = [{"tokens_total": 10 * i, "train_loss": train, "val_loss": val} for i, (train, val) in enumerate(losses)]
    curves = pico.plot_loss_curve(rows).axes[0].lines
    assert [list(line.get_xdata()) for line in curves[:2]] == [[0, 10, 20], [20]]
    assert curves[2].get_ydata()[0] == pytest.approx(math.log(50257))
    assert len(pico.plot_loss_curve([]).axes[0].lines) == 1
    markers = [line.get_marker() for line in pico.plot_loss_curve(rows[:1]).axes[0].lines]
    assert markers == [".", "None"], "a single value is a dot"


def test_emergence_shows_the_best_heads_by_tokens_what_it_means_and_a_legend_of_every_line():
    best = {"previous": [0.02, 0.1, 0.5, 0.9], "induction": [0.01, 0.0, 0.1, 0.2]}
    head = pd.DataFrame({"step": [0, 10, 100, 1000], "layer": 0, "head": 0, **dict.fromkeys(pico.KAPPAS, 0.0), **best})
    history = pd.concat([head, head.assign(head=1, previous=head["previous"] / 2)])
    figure = pico.plot_head_emergence(history.assign(tokens=64 * history["step"]).to_dict("records"))
    (axes,) = figure.axes
    drawn = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(drawn[0], [[640, 0.1], [6400, 0.5], [64000, 0.9]])
    assert axes.get_xscale() == "log" and "tokens" in axes.get_xlabel()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(legend) == len(drawn) + 2
    assert {"previous: the previous token", "threshold (0.30)", "highest before training (0.02)"} <= set(legend)
    words = figure.get_suptitle().replace("\n", " ")
    assert words.startswith("The first previous-token head appears between 640 and 6,400 tokens of training (score")
    assert words.endswith("(score 0.30); no induction head appears (highest score 0.20, threshold 0.30).")
    late = history[history["step"] >= 100].assign(tokens=6400)
    words = pico.describe_emergence(late, pico.ScoreThresholds())
    assert words.startswith(
        "The first previous-token head is there when scoring begins, after 6,400 tokens of training"
    )


def test_pie_and_grid_show_each_head_in_its_class():
    scores = make_study(4, 4).scores
    figure, classes = pico.plot_class_grid(scores), scores.pivot(index="layer", columns="head", values="class")
    shares = [abs(wedge.theta2 - wedge.theta1) / 360 for wedge in figure.axes[0].patches]
    assert sorted(shares) == pytest.approx(sorted(classes.stack().value_counts(normalize=True)))
    np.testing.assert_array_equal(maps_of(figure)[0], classes.map(pico.HEAD_CLASSES.index))
    labels = [text.get_text().split("\n")[0] for text in figure.axes[1].texts]
    assert labels[:4] == ["previous", "mixed", "previous", "broad"]


@pytest.mark.parametrize("name", ["class_baselines", "categories"])
def test_bars_of_classes_add_up_and_show_the_shares(name):
    study = make_study(4, 4)
    (shares,) = (data for each, _, _, data, *_ in pico.model_pictures(study) if each == name)
    (axes,) = pico.plot_class_bars(shares).axes
    categories = "Held-out text", *pico.ALL_TEST_CATEGORIES
    assert labels_of(axes.yaxis) == list(categories if name == "categories" else pico.MODEL_NAMES.values())
    if name == "categories":  # one of the reader's, called as a model is
        (other,) = pico.plot_class_bars(shares.replace({"category": {"Simple": "uniform"}})).axes
        assert labels_of(other.yaxis)[1] == "uniform"
    ends = [segment[:, 0] for segment in axes.collections[0].get_segments() if len(segment)]
    np.testing.assert_allclose(ends, shares.loc[shares["class"] == "Specialised", ["low", "high"]])
    widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])  # (classes, rows)
    np.testing.assert_allclose(widths.sum(axis=0), 1)
    held_out = study.shares.query("model == 'trained'").set_index("class")["share"]
    np.testing.assert_allclose(widths[:, 0], held_out.reindex(pico.HEAD_CLASSES).fillna(0))


def test_maps_of_layers_and_heads_outline_what_is_beyond_the_threshold():
    study, found = make_study(3, 2), []
    for axes in pico.plot_score_maps(study.scores, study.thresholds).axes[:9]:
        name = axes.get_title("left").split(":")[0].lower()
        beyond = study.scores[study.scores[name] >= (0.9 if name == "broad" else 0.3)]
        assert {frame.get_xy() for frame in axes.patches} == set(zip(beyond["head"], beyond["layer"], strict=True))
        assert [text.get_text() for text in axes.texts] == [pico.number(value) for value in study.scores[name]]
        found.append(len(beyond) > 0)
    assert found == sorted(found, reverse=True) and any(found) and not all(found)  # what was found comes first
    ablation = study.ablation.assign(loss_increase=[0.03, -0.01, 0, 0, 0, 0], matters=[True] + 5 * [False])
    figure = pico.plot_ablation(ablation)
    assert {frame.get_xy() for frame in figure.axes[0].patches} == {(0, 0)}
    np.testing.assert_allclose(figure.axes[0].collections[0].get_clim(), (-30, 30))
    np.testing.assert_allclose(maps_of(figure)[0], [[30, -10], [0, 0], [0, 0]])


@pytest.mark.parametrize("n_head", [1, 2, 4, 7])
def test_no_words_are_printed_over_others_or_cut_off(n_head):
    study, capture = make_study(2, n_head), make_capture(SENTENCE, 2, n_head)
    heads = pico.choose_heads(study.scores)
    chosen, ablation = pico.plot_chosen_heads(capture, heads[:1], study.scores), pico.plot_ablation(study.ablation)
    for figure in (maps := pico.plot_score_maps(study.scores, study.thresholds), chosen, ablation):
        figure.draw_without_rendering()
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1
    titles = [axes._left_title.get_window_extent() for axes in maps.axes[:9]]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(titles, 2))


def test_similar_heads_stand_together():
    kinds, rng, scores = np.array([0, 1, 0, 1, 1, 0]), np.random.default_rng(0), make_study(3, 2).scores
    distances = np.where(kinds[:, None] == kinds, 0.1, 0.7) + rng.uniform(0, 0.05, (6, 6))
    distances = (distances + distances.T) / 2 * (1 - np.eye(6))
    tree, heatmap = pico.plot_similarity(distances, 0.2, scores).axes[:2]
    order = [int(name[1]) * 2 + int(name[3]) for name in labels_of(heatmap.yaxis)]
    assert len(set(kinds[order][:3])) == 1 and len(set(kinds[order][3:])) == 1
    np.testing.assert_allclose(heatmap.collections[0].get_array(), distances[np.ix_(order, order)])
    assert tree.lines[0].get_ydata()[0] == 0.2
    classes = pico.head_kinds(scores)["class"].iloc[order]
    assert [label.get_color() for label in heatmap.get_yticklabels()] == [pico.CLASS_COLORS[name] for name in classes]


def test_language_picture_shows_what_each_number_must_exceed():
    figure = pico.plot_language(language := make_language(trained=False))
    for axes, name in zip(figure.axes, ("accuracy", "attention"), strict=False):
        lines = {line.get_label(): line.get_xdata() for line in axes.lines}
        np.testing.assert_allclose(lines["highest of the untrained models"], language[f"untrained_{name}_highest"])
        ends = [segment[:, 0] for segment in axes.collections[0].get_segments()]
        np.testing.assert_allclose(ends, language[[f"{name}_low", f"{name}_high"]])
    bands = [segment[:, 0] for segment in figure.axes[2].collections[0].get_segments() if segment.ndim == 2]
    np.testing.assert_allclose(bands, language[["random_margin_low", "random_margin_high"]].dropna())
    assert figure.legends[0].get_texts()[-1].get_text() == "95% of random sets of as many heads"
    p_values = [text.get_text() for text in figure.axes[2].texts]
    assert p_values == [f"p = {p:.2g}" if math.isfinite(p) else "not ranked" for p in language["needs_p_value"]]


def test_every_picture_has_a_file_and_words_and_draws_in_a_thread_without_pyplot(tmp_path):
    texts = {"Simple": ["The cat sat.", "A dog ran."], "Quotes & <tags>": ["He <b>said</b> & left."]}
    captures = {category: [make_capture(text) for text in members] for category, members in texts.items()}
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # matplotlib 3.8 with today's pyparsing
        pictures = thread.submit(pico.draw_study, make_study(2, 2), captures, tmp_path).result()
    assert not pyplot.get_fignums()
    of_model = [picture.path for picture in pictures if picture.group == "Model"]
    assert [path.stem for path in of_model] == [name for name, *_ in pico.model_pictures(make_study(2, 2))]
    files = [picture.path for picture in pictures] + [path.with_suffix(".svg") for path in of_model]
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)
    assert all(len(picture.alt) > 20 and picture.caption and picture.title.endswith("?") for picture in pictures)
    assert len({picture.alt for picture in pictures}) == len(pictures) == 9 + 2 * 5
    assert ElementTree.parse(of_model[0].with_suffix(".svg")).getroot().tag.endswith("svg")
    with Image.open(pictures[-1].path) as image:
        assert min(image.size) > 600 and 20 < len(image.convert("RGB").getcolors(10**6)) <= 256


def test_pictures_without_their_data_are_left_out(tmp_path):
    study, none = make_study(2, 2), pd.DataFrame()
    bare = dataclasses.replace(study, metrics=none, history=none, language=none, distances=np.zeros((1, 1)))
    names, left = ([name for name, *_ in pico.model_pictures(each)] for each in (study, bare))
    assert set(names) - set(left) == {"loss_curve", "head_emergence", "language", "similarity"}
    (tmp_path / "file").write_text("")
    with pytest.raises(pico.PicoError, match="Cannot write"):
        pico.save_figure(pico.plot_loss_curve([]), tmp_path / "file" / "loss")
