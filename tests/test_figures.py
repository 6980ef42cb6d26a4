"""Figures: what is drawn is what was measured, on any text, and quickly enough."""

import dataclasses
import math
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from study_data import make_capture, make_language, make_study

import pico_helpers as pico

SENTENCE = "The cat saw the dog and the dog saw the cat."


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def images_of(figure):
    return [image for axes in figure.axes for image in axes.images]


def test_rollout_of_uniform_heads_is_the_known_number():
    rollout = pico.attention_rollout(pico.uniform_attention(8, 20))
    assert rollout[-1, 0] == pytest.approx(0.53, abs=0.005)
    np.testing.assert_allclose(rollout.sum(axis=1), 1)
    assert np.all(np.triu(rollout, 1) == 0)


def test_rollout_multiplies_layers_in_order():
    one_back = np.eye(4, k=-1) + np.diag([1, 0, 0, 0])  # layer 0 looks one back, layer 1 two back
    two_back = np.eye(4, k=-2) + np.diag([1, 1, 0, 0])
    rollout = pico.attention_rollout(np.stack([one_back, two_back])[:, None])
    np.testing.assert_allclose(rollout, (two_back + np.eye(4)) / 2 @ (one_back + np.eye(4)) / 2)


def test_heatmap_shows_the_weights_with_a_grey_future():
    capture = make_capture(SENTENCE)
    figure = pico.plot_attention_heatmap(capture, 1, 0)
    colors = images_of(figure)[0].get_array()
    n = len(capture.labels)
    expected = matplotlib.colormaps["viridis"](capture.weights[1, 0].numpy(), bytes=True)
    lower = np.tri(n, dtype=bool)
    np.testing.assert_array_equal(colors[lower], expected[lower])
    grey = np.round(255 * np.array(matplotlib.colors.to_rgba("#d5d5d5"))).astype(int)
    assert np.all(colors[~lower] == grey)
    assert {"·dog", "·dog²", "·the³"} <= set(texts_of(figure))  # each label names one position


def test_all_heads_are_tiled_layer_by_layer_on_one_scale():
    capture = make_capture(SENTENCE, n_layer=3, n_head=2)
    n = len(capture.labels)
    tiles = images_of(pico.plot_all_heads(capture))[0].get_array()
    assert tiles.shape == (3 * n, 2 * n, 4)
    expected = matplotlib.colormaps["viridis"](capture.weights[2, 1].numpy(), bytes=True)
    lower = np.tri(n, dtype=bool)
    np.testing.assert_array_equal(tiles[2 * n :, n:][lower], expected[lower])


def test_long_sentences_are_cut_and_the_caption_says_so():
    capture = make_capture(" ".join(["word another"] * 35))
    n = len(capture.labels)
    assert n > 60
    heatmap = pico.plot_attention_heatmap(capture, 0, 0)
    assert images_of(heatmap)[0].get_array().shape[:2] == (40, 40)
    assert f"first 40 of {n} tokens" in " ".join(texts_of(heatmap)).replace("\n", " ")
    assert f"first 20 of {n} tokens" in " ".join(texts_of(pico.plot_attention_flow(capture))).replace("\n", " ")
    assert len(pico.attention_graph(capture.weights[0, 0], capture.labels)) == 20
    assert f"first 40 of {n} tokens" in " ".join(texts_of(pico.plot_rollout(capture))).replace("\n", " ")


def test_attention_graph_keeps_the_strongest_looks():
    weights = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.45, 0.15, 0.4, 0], [0.3, 0.32, 0.0, 0.38]])
    graph = pico.attention_graph(weights, ["a", "b", "a", "c"], max_edges=2)
    edges = {(i, j): w for i, j, w in graph.edges(data="weight")}
    assert edges == {(1, 0): 0.9, (2, 0): 0.45, (2, 2): 0.4, (3, 3): 0.38, (3, 1): 0.32}  # (3, 0) would be a third
    assert pico.attention_graph(pico.uniform_attention(1, 9)[0, 0], list("abcdefghi")).number_of_edges() == 0
    assert list(dict(graph.nodes(data="label")).values()) == ["a", "b", "a²", "c"]


@pytest.mark.parametrize(
    "text", ["日本語のテキスト", "I ❤️ 🎉🎉 parties", "cost $x$ and $\\frac{1}{0$", "\x00\x1b bell", "שלום مرحبا", "a"]
)
def test_any_text_is_drawn_without_a_warning(text, tmp_path):
    capture = make_capture(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing glyphs, formulas that do not parse
        for plot in (pico.plot_all_heads, pico.plot_attention_flow, pico.plot_rollout):
            pico.save_figure(plot(capture), tmp_path / plot.__name__)
        pico.save_figure(pico.plot_attention_heatmap(capture, 0, 0), tmp_path / "heatmap")
        pico.save_figure(pico.plot_category([capture], text, [(0, 0, "")]), tmp_path / "category")


def test_characters_without_a_font_become_their_code():
    text, fonts = pico.readable_text("a\U0010fffd\u200db")
    assert text == "a[U+10FFFD][U+200D]b"
    assert fonts == ["DejaVu Sans"]


def test_other_installed_fonts_help_out(monkeypatch):
    from matplotlib.font_manager import FontEntry, fontManager

    for function in (pico._font_for, pico._characters_of):
        function.cache_clear()
    monkeypatch.setattr(fontManager, "ttflist", [FontEntry(fname="cjk", name="Some CJK", style="normal", weight=400)])
    monkeypatch.setattr(pico, "_characters_of", lambda path: {ord("日")} if path == "cjk" else set())
    assert pico.readable_text("日本") == ("日[U+672C]", ["DejaVu Sans", "Some CJK"])
    pico._font_for.cache_clear()


def test_the_font_of_last_resort_is_not_readable():
    from matplotlib.font_manager import fontManager

    text, fonts = pico.readable_text("日🎉")
    assert not any("Last Resort" in font for font in fonts)
    assert set(fonts) <= {entry.name for entry in fontManager.ttflist}
    assert ("U+65E5" in text) == (len(fonts) == 1)  # drawn if the machine has a font for it, else its code


def test_save_figure_writes_png_and_svg_and_leaves_nothing_else(tmp_path):
    paths = pico.save_figure(pico.plot_rollout(make_capture(SENTENCE)), tmp_path / "a" / "rollout")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["rollout.png", "rollout.svg"]
    with Image.open(paths[0]) as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(10**6)) > 20  # more than an empty sheet
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    (tmp_path / "file").write_text("")
    with pytest.raises(pico.PicoError, match="Cannot write"):
        pico.save_figure(pico.plot_loss_curve([]), tmp_path / "file" / "loss")


def test_png_colours_stay_true(tmp_path):
    figure = pico.plot_all_heads(make_capture(SENTENCE, 4, 4))
    png, _ = pico.save_figure(figure, tmp_path / "heads")
    figure.savefig(tmp_path / "plain.png", dpi=110)
    ours, plain = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (png, tmp_path / "plain.png"))
    assert np.abs(ours - plain).max() <= 8
    assert png.stat().st_size < (tmp_path / "plain.png").stat().st_size / 2


def test_loss_curve_leaves_out_what_was_not_measured():
    rows = [
        {"step": 0, "train_loss": 10.8, "val_loss": None},
        {"step": 10, "train_loss": 9.0, "val_loss": float("nan")},
    ]
    rows.append({"step": 20, "train_loss": 8.0, "val_loss": 8.5})
    curves = pico.plot_loss_curve(rows).axes[0].lines
    assert [list(line.get_xdata()) for line in curves[:2]] == [[0, 10, 20], [20]]
    assert curves[2].get_ydata()[0] == pytest.approx(math.log(50257))


def test_pie_and_bars_show_the_shares():
    study = make_study(4, 4)
    pie, bars = pico.plot_class_shares(study.scores).axes
    shares = study.scores[study.scores["source"] == "windows"]["class"].value_counts(normalize=True)
    angles = [abs(wedge.theta2 - wedge.theta1) / 360 for wedge in pie.patches]
    assert sorted(angles) == pytest.approx(sorted(shares))
    assert sum(bar.get_height() for bar in bars.patches) == 16
    assert "held-out text" in pie.get_title("left")


def test_baseline_bars_have_their_intervals():
    study = make_study(4, 4)
    axes = pico.plot_class_baselines(study.shares).axes[0]
    rows = study.shares[(study.shares["source"] == "windows") & (study.shares["model"] == "trained")].set_index("class")
    names = [label.get_text() for label in axes.get_xticklabels()]
    heights = [bar.get_height() for bar in axes.containers[0]]
    np.testing.assert_allclose(heights, 100 * rows.loc[names, "share"])
    ends = [segment[:, 1] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(ends, 100 * rows.loc[names, ["low", "high"]])


def test_ablation_map_is_centred_on_zero():
    ablation = make_study(3, 2).ablation.copy()
    ablation["loss_increase"] = [0.03, -0.01, 0, 0, 0, 0]
    ablation["standard_error"] = [0.001, 0.001, 1e-6, 1e-6, 1e-6, 1e-6]
    figure = pico.plot_ablation(ablation, n_windows=8)
    image = images_of(figure)[0]
    assert [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"] == ["30"]
    assert image.norm.vmin == pytest.approx(-30) and image.norm.vmax == pytest.approx(30)
    np.testing.assert_allclose(image.get_array(), [[30, -10], [0, 0], [0, 0]])


def test_language_picture_shows_every_baseline_on_a_scale_that_keeps_noise_small():
    language = make_language(trained=False)
    panels = pico.plot_language(language).axes
    for axes, name in zip(panels, ("untrained_accuracy_highest", "untrained_attention_highest"), strict=False):
        hollow = next(c for c in axes.collections if c.get_label() == "highest of the untrained models")
        np.testing.assert_allclose(hollow.get_offsets()[:, 0], language[name])
    ends = [segment[:, 0] for segment in panels[2].containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, language[["margin_excess_low", "margin_excess_high"]])
    tiny = language.assign(attention_difference=0.001, attention_low=0.0005, attention_high=0.0015)
    low, high = pico.plot_language(tiny.assign(untrained_attention_highest=0.0)).axes[1].get_xlim()
    assert low <= -pico.NULL_ATTENTION and high >= 0.1


def test_no_number_is_minus_zero():
    assert [pico._number(value) for value in (-0.001, 0.0, -0.006, 0.125)] == ["0.00", "0.00", "-0.01", "0.12"]
    scores = make_study(2, 2, trained=False).scores
    scores["previous"] = -1e-4
    assert "highest previous score: 0.00" in [why for *_, why in pico.choose_heads(scores, 8)]


def test_similar_heads_stand_together():
    kinds = np.array([0, 1, 0, 1, 1, 0])
    rng = np.random.default_rng(0)
    distances = np.where(kinds[:, None] == kinds, 0.1, 0.7) + rng.uniform(0, 0.05, (6, 6))
    distances = (distances + distances.T) / 2 * (1 - np.eye(6))
    tree, heatmap = pico.plot_head_similarity(distances, n_head=2, noise_floor=0.2).axes[:2]
    names = [label.get_text() for label in heatmap.get_yticklabels()]
    order = [int(layer) * 2 + int(head) for layer, head in (name.split(".") for name in names)]
    assert len(set(kinds[order][:3])) == 1 and len(set(kinds[order][3:])) == 1
    np.testing.assert_allclose(heatmap.images[0].get_array(), distances[np.ix_(order, order)])
    assert tree.lines[0].get_ydata()[0] == 0.2


def test_chosen_heads_are_the_highest_and_differ():
    study = make_study(3, 3)
    heads = pico.choose_heads(study.scores)
    windows = study.scores[study.scores["source"] == "windows"]
    top = windows.loc[windows["previous"].idxmax()]
    assert heads[0][:2] == (top["layer"], top["head"])
    assert len({head[:2] for head in heads}) == 4
    assert len(pico.choose_heads(make_study(1, 2).scores)) == 2  # a model with fewer heads


@pytest.fixture
def small_study():
    captures = {"Simple": [make_capture("The cat sat.")], "Quotes & <tags>": [make_capture("He <b>said</b> & left.")]}
    return captures, make_study(2, 2), make_language()


def test_every_picture_has_a_file_and_words(small_study, tmp_path):
    captures, study, language = small_study
    rows = [{"step": 1, "train_loss": 9.0, "val_loss": None}]
    pictures = pico.draw_study(captures, study, language, tmp_path, rows)
    files = {path.relative_to(tmp_path) for path in tmp_path.glob("**/*.*")}
    assert len(pictures) == 13 + 2 * 5
    assert files == {p.path.with_suffix(s).relative_to(tmp_path) for p in pictures for s in (".png", ".svg")}
    assert all(len(picture.alt) > 20 and picture.caption and picture.title for picture in pictures)
    assert [picture.group for picture in pictures[:13]] == ["Model"] * 13
    assert len({picture.alt for picture in pictures}) == len(pictures)
    flow = next(p for p in pictures if p.path.stem == "01_flow")
    assert "looks at" in flow.alt


@pytest.mark.parametrize("python", ["this one", "/bin/false"])
def test_other_processes_draw_the_same_pictures(small_study, tmp_path, monkeypatch, python):
    captures, study, _ = small_study
    monkeypatch.setattr(pico, "_plan_model", lambda *_: [])
    pico.draw_study(captures, study, None, tmp_path / "alone")
    monkeypatch.setattr(pico, "_PARALLEL_FROM", 2)
    monkeypatch.setattr(pico.os, "cpu_count", lambda: 2)
    if python != "this one":
        monkeypatch.setattr(pico.sys, "executable", python)  # processes that fail: their share is drawn here
    pictures = pico.draw_study(captures, study, None, tmp_path / "together")
    for picture in pictures:
        alone = tmp_path / "alone" / picture.path.relative_to(tmp_path / "together")
        assert alone.read_bytes() == picture.path.read_bytes()


def test_a_capture_of_a_real_model_is_drawn(tmp_path):
    config = pico.ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=32)
    capture = pico.capture_attention(pico.PicoLLM(config), SENTENCE)
    figure = pico.plot_chosen_heads(dataclasses.replace(capture), [(0, 0, "why"), (1, 1, "why not")])
    assert len(images_of(figure)) == 3  # two maps and the colour bar
    assert "Layer 1, head 1" in texts_of(figure)


# --- heads over training ----------------------------------------------------------------------------------------------


def history_of(**best: list[float]) -> list[dict]:
    """Scores of two heads at steps 0, 10, 100, 1000: the first has the given ones, the second half of them."""
    return [
        {"step": step, "layer": 0, "head": head}
        | {name: best.get(name, [0.0] * 4)[k] / (1 + head) for name in pico.KAPPAS}
        for k, step in enumerate((0, 10, 100, 1000))
        for head in range(2)
    ]


def test_emergence_shows_best_mean_and_untrained_by_tokens():
    rows = history_of(previous=[0.02, 0.1, 0.5, 0.9], induction=[0.01, 0.0, 0.1, 0.2])
    metrics = [{"step": step, "tokens": 64 * step, "train_loss": 9.0, "val_loss": None} for step in (20, 1000)]
    figure = pico.plot_head_emergence(rows, metrics)
    top, bottom = figure.axes
    assert bottom.get_xscale() == "log" and "tokens" in bottom.get_xlabel()
    lines = [line for line in bottom.lines if line.get_color() == pico._EMERGENCE_COLORS["previous"]]
    untrained, best, mean, circle = (np.array(line.get_xydata(), float) for line in lines)
    np.testing.assert_allclose(untrained[:, 1], 0.02)
    np.testing.assert_allclose(best, [[640, 0.1], [6400, 0.5], [64000, 0.9]])
    np.testing.assert_allclose(mean[:, 1], [0.075, 0.375, 0.675])
    np.testing.assert_allclose(circle, [[6400, 0.5]])
    np.testing.assert_allclose(top.lines[0].get_xdata(), [1280, 64000])
    induction = [line for line in bottom.lines if line.get_color() == pico._EMERGENCE_COLORS["induction"]]
    assert len(induction) == 3, "it reaches no threshold, so there is no circle"
    assert pico.plot_head_emergence(rows, []).axes[1].get_xlabel().startswith("step")


def test_emergence_in_words():
    thresholds = pico.ScoreThresholds()
    rows = pd.DataFrame(history_of(previous=[0.02, 0.1, 0.5, 0.9], induction=[0.01, 0.0, 0.1, 0.2]))
    assert pico.describe_emergence(rows, thresholds) == (
        "The first previous-token head appears between steps 10 and 100 (threshold 0.30); no induction head appears "
        "(highest score 0.20, threshold 0.30)."
    )
    higher = dataclasses.replace(thresholds, tau=thresholds.tau | {"previous": 0.6})
    assert "between steps 100 and 1,000 (threshold 0.60)" in pico.describe_emergence(rows, higher)
    there = pd.DataFrame(history_of(previous=[0.4] * 4, induction=[0.0, 0.3, 0.1, 0.1]))
    text = pico.describe_emergence(there, thresholds)
    assert "from step 0 on, the first one scored" in text and "induction head appears between steps 0 and 10" in text
    assert (
        pico.first_snapshots(there, thresholds)["induction"] == 10
        and not pico.first_snapshots(rows, thresholds)["sink"]
    )


def test_the_study_holds_the_picture_when_the_scores_are_there(tmp_path):
    rows = history_of(previous=[0.02, 0.1, 0.5, 0.9])
    study, captures = make_study(), {"Simple": [make_capture(SENTENCE)]}
    pictures = {p.path.stem: p for p in pico.draw_study(captures, study, None, tmp_path / "with", head_rows=rows)}
    picture = pictures["head_emergence"]
    assert picture.path.exists() and picture.caption == pico.describe_emergence(pd.DataFrame(rows), study.thresholds)
    assert "previous 0.02 to 0.90" in picture.alt
    findings = pico.study_findings(study)
    report = pico.write_report(tmp_path / "report.html", findings, list(pictures.values())).read_text()
    assert picture.caption in report
