"""Report and explorer: verdicts follow the evidence, every text is escaped, and the pages work in a real browser."""

import base64
import dataclasses
import functools
import html.parser
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from study_data import make_capture, make_study

import pico_helpers as pico

SENTENCES = {"Simple": ["The cat sat on the mat.", "The dog saw the cat."]}
SENTENCES |= {"Hostile": ["</script><script>alert(1)</script> & \"quotes\" 'too'", "日本 {{title}} 🎉"]}


def statements(study, topic):
    return {row["claim"]: row for row in pico.study_findings(study)["statements"] if row["topic"] == topic}


def explorer_data(captures, scores=None):
    return json.loads(re.search(r'class="pico-data">(.*?)</script>', pico.explorer_html(captures, scores), re.S)[1])


def captures_of(sentences, n_layer=2, n_head=2):
    return {name: [make_capture(text, n_layer, n_head, k) for k, text in enumerate(t)] for name, t in sentences.items()}


def test_verdicts_and_lead_of_a_study_with_known_truth():
    study = make_study(3, 4)
    heads = statements(study, "Heads")
    found = [claim for claim, row in heads.items() if row["verdict"] == "supported"]
    names = ("first token", "previous token", "last three", "what followed earlier copies")
    assert len(found) == len(names) and all(any(name in claim for claim in found) for name in names)
    classes, ablation = (statements(study, topic).values() for topic in ("Classes", "Ablation"))
    assert [row["verdict"] for row in classes] == ["supported", "undecided", "not supported"]
    assert "scores: 6 heads at 0.2, 6 heads at 0.3, 6 heads at 0.4." in next(iter(classes))["evidence"]
    assert {row["verdict"] for row in ablation} == {"supported"}
    assert statements(study, "Language")["The model handles subject and verb"]["verdict"] == "supported"
    previous = heads["A head looks at the previous token"]["evidence"]  # the number, its interval, both baselines
    assert re.fullmatch(r"The best head, L0H\d, scores 0\.\d\d \(0\.\d\d to 0\.\d\d\); .* 0\.30, .* 0\.030\.", previous)
    lead = pico.study_findings(study)["headline"]
    assert lead[0].startswith("6 of the 12 heads specialise on held-out text: 2 look at the token itself or the one")
    assert lead[0].endswith(", 2 look at what followed earlier copies of the token.")
    assert "untrained models of the same shape none do" in lead[1] and "shuffled, 6 do." in lead[1]
    assert lead[2].startswith("Without the heads that look at the token itself or the one before it, the loss")
    assert "rises by 0.25 nats per token, without as many at random by 0.01." in lead[2]  # of the same text
    assert lead[-2].startswith("Of 5 claims about language: 2 supported (“Subject and verb”, “Coreference”), 3 un")
    assert "The original study, the notebook" in lead[-1]
    study.class_ablation["p_value"] = 0.5
    assert pico.study_findings(study)["headline"][2].endswith(": no clear difference.")
    study.class_ablation["n_random_sets"] = 0  # nothing to compare with
    assert "at random" not in " ".join(pico.study_findings(study)["headline"])


def test_nothing_is_found_where_nothing_is(tiny_model, tmp_path):
    study = make_study(3, 4, trained=False)
    findings = pico.study_findings(study)
    assert {row["verdict"] for row in findings["statements"]} <= {"not supported", "undecided"}
    assert "finds nothing" in findings["headline"][0] and findings["headline"][1].startswith("0 of the 12 heads")
    nothing = dict.fromkeys(("language", "categories", "history", "metrics"), pd.DataFrame())
    study = dataclasses.replace(study, **nothing, class_ablation=study.class_ablation[:0])
    page = pico.write_report(tmp_path / "report.html", pico.study_findings(study), []).read_text("utf-8")
    assert "Loss without each" in page and "The claims in numbers" not in page and "<img" not in page
    windows = torch.randint(0, 5000, (8, 64), generator=torch.Generator().manual_seed(0))
    study = pico.study_model(tiny_model, {"Simple": SENTENCES["Simple"]}, windows, n_bootstrap=50, n_items=20)
    assert "finds nothing" in pico.study_findings(study)["headline"][0]


def test_a_share_within_the_untrained_range_is_no_finding_and_shuffling_may_change_it():
    for limit, expected in ((0.49, "undecided"), (0.6, "not supported")):  # this model: 1/2, interval down to 0.47
        study = make_study(3, 4)
        special = study.shares["class"].isin([*pico.SPECIALISED_CLASSES, "Specialised"])
        study.shares.loc[special & (study.shares["model"] == "untrained"), "high"] = limit
        assert next(iter(statements(study, "Classes").values()))["verdict"] == expected
        assert len(statements(study, "Ablation")) == 1  # no claim about a class that was not found
    study = make_study(3, 4)
    study.shares.loc[study.shares["model"] == "shuffled", ["share", "low", "high"]] = 0.0
    claim = "The share of some classes depends on the order of the words"
    assert statements(study, "Classes")[claim]["verdict"] == "supported"


def test_heads_are_unimportant_only_where_the_data_exclude_it():
    for words, changes, expected in (
        ("Single heads", {"standard_error": 0.05}, "undecided"),  # none stands out, any may matter
        ("Single heads", {"loss_increase": 5e-4, "standard_error": 1e-5}, "not supported"),  # of no consequence
        ("Single heads", {"loss_increase": 5e-4, "standard_error": [1e-3] + [1e-5] * 11}, "undecided"),  # one unsure
        ("last three tokens", {"p_value": 0.06}, "undecided"),  # other heads may matter as much
        ("last three tokens", {"excess_low": -0.01}, "undecided"),  # on other text
        ("last three tokens", {"loss_increase": 1e-4, "low": -1e-3, "high": 1e-3 - 1e-6}, "not supported"),
        ("last three tokens", {"n_random_sets": 0, "p_value": np.nan}, "undecided"),
    ):
        study = make_study(3, 4)
        for column, value in changes.items():
            (study.ablation if words == "Single heads" else study.class_ablation)[column] = value
        row = next(row for claim, row in statements(study, "Ablation").items() if words in claim)
        assert row["verdict"] == expected, changes
        assert words == "Single heads" or f"{study.class_ablation['high'].iloc[0]:.3f}" in row["evidence"]
        assert ("too few others" in row["evidence"]) == (changes.get("n_random_sets") == 0)


def test_findings_are_strict_json_with_every_number(tmp_path):
    study = make_study(2, 2)
    study.scores.loc[0, "induction"] = np.nan
    findings = pico.study_findings(study)
    read = json.loads(json.dumps(findings, allow_nan=False), parse_constant=lambda name: pytest.fail(name))
    assert read == findings and read["head_scores"][0]["induction"] is None
    assert read["head_scores"][1]["previous"] == pytest.approx(study.scores.loc[1, "previous"])
    assert read["thresholds"]["tau"]["sink"] == 0.3 and read["thresholds"]["null_attention"] == pico.NULL_ATTENTION
    tables = {"class_shares": study.shares, "language": study.language, "categories": study.categories}
    assert all(len(read[name]) == len(table) for name, table in tables.items())


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], []
        self.handle_starttag = lambda tag, attributes: self.elements.append((tag, dict(attributes)))
        self.handle_data = self.words.append
        self.feed(text)


def make_pictures(folder):
    """A picture of each name that a study draws."""
    study, pictures = make_study(2, 2), []
    of_sentences = pico.sentence_pictures([make_capture("The cat sat.")], [(0, 0)], study.scores)
    groups = ("model", "Model", pico.model_pictures(study)), ("01_simple", "Simple <sentences>", of_sentences)
    for place, group, plans in groups:
        (folder / place).mkdir(parents=True)
        for name, *_ in plans:
            Figure(figsize=(4, 2)).savefig(path := folder / place / f"{name}.png")
            pictures.append(pico.Picture(path, group, f"Title {name}", f"Alt {name}", f"Caption {name}"))
    return pictures


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, study = tmp_path_factory.mktemp("report"), make_study(2, 2)
    study.language.loc[0, "claim"] = "<b>claims</b> are & stay text"
    pictures = make_pictures(folder / "figures")
    findings = pico.study_findings(study, {"Corpus": "<i>offline</i> {{ headline }} {rule}"})
    return pico.write_report(folder / "attention_report.html", findings, pictures), pictures, findings


def test_report_is_one_page_that_describes_every_picture_and_escapes_every_text(report):
    path, pictures, findings = report
    page = Page(text := path.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    alts = [picture.alt for picture in pictures] + ["Alt chosen_heads"]  # one is the example
    assert sorted(image["alt"] for image in images) == sorted(alts)
    assert all(base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG") for image in images)
    anchors = {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}  # the contents list every section
    assert links == anchors | {"attention_explorer.html", "findings.json", "head_scores.csv"}
    words = " ".join("".join(page.words).split())
    for row in findings["statements"]:
        assert " ".join(row["claim"].split()) in words and " ".join(row["evidence"].split()) in words
    assert all(line in words for line in findings["headline"])
    terms = ("threshold of previous", "null attention", "No head does this", "A class has two numbers", "explore")
    for term in (*terms, pico.CLASS_RULE, '"My sentence."'):
        assert term in words
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}  # every text is escaped
    for own in ("<b>claims</b> are & stay text", "<i>offline</i> {{ headline }} {rule}"):
        assert html.escape(own) in text  # nor is one filled that looks like a template
    tables = [re.findall(r"<th>(.*?)</th>", head) for head in re.findall(r"<thead>(.*?)</thead>", text, re.S)]
    assert len(tables) == 4 and sum("verdict" in columns for columns in tables) == 1
    assert all(len(columns) <= 13 and not any("_" in name for name in columns) for columns in tables)
    losses = re.search(r"standard error</th>.*?<tbody>(.*?)</tbody>", text, re.S)[1]
    losses = [float(row) for row in re.findall(r"<td>L\dH\d</td>\s*<td>(-?\d\.\d{3})</td>", losses)]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)


def test_only_pictures_of_a_study_are_removed(tmp_path):
    make_pictures(tmp_path)
    own = ["my_thesis.tex", "model/notes.png", "model/ablation.tex", "01_simple/deep/01_heads.png", "mine/01_heads.png"]
    for name in own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (old := tmp_path / "02_questions").mkdir()
    (old / "category_grid.svg").write_text("<svg/>")
    pico.remove_old_pictures(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(own)
    assert not old.exists()
    pico.remove_old_pictures(tmp_path / "nowhere")


def test_explorer_holds_the_root_of_every_weight_to_a_256th_and_escapes_every_text():
    captures = captures_of(SENTENCES, 3, 2)["Hostile"]  # a list of sentences does as well
    data = explorer_data(captures)
    assert [head["name"] for head in data["heads"]] == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]
    for text, capture in zip(data["texts"], captures, strict=True):
        roots, lower = np.zeros(capture.weights.shape), np.tri(len(capture.labels), dtype=bool)
        roots[:, :, lower] = np.frombuffer(base64.b64decode(text["maps"]), np.uint8).reshape(3, 2, -1) / 255
        np.testing.assert_allclose(roots, capture.weights.sqrt().numpy(), atol=0.5 / 255 + 1e-6)
    elements = Page(pico.explorer_html(captures)).elements
    assert [tag for tag, _ in elements].count("script") == 2
    assert not any("id" in attributes or attributes.get("name") for _, attributes in elements)  # copies would share it
    with pytest.raises(pico.PicoError, match="at least one sentence"):
        pico.explorer_html({})


def test_explorer_says_what_each_head_does_and_opens_on_the_most_telling():
    study = make_study(3, 4)
    captures = captures_of({"Plain": ["The cat sat."], "Repeats": ["one two three one two three"]}, 3, 4)
    data = explorer_data(captures, study.scores)
    heads = {head["name"]: head["does"] for head in data["heads"]}
    assert heads["L0H0"] == "looks at the previous token" and heads["L1H2"] == "looks at the last three tokens"
    assert heads["L0H1"].endswith("and parks its attention on the first token")
    telling = data["heads"][data["telling"][0]]["name"]
    assert heads[telling].endswith("what followed earlier copies of the token"), "though others score higher"
    assert data["text"] == 1  # where induction can be seen
    study.scores.loc[study.scores["class"] == "Token-Specific", "class"] = "Mixed"
    assert explorer_data(captures, study.scores)["text"] == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="browser tests need selenium: pip install selenium")
    chromium, server = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and server):
        pytest.skip("browser tests need Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no name resolves: the network is cut
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(server)) as driver:
        yield driver


class Tab:
    def __init__(self, driver):
        self.driver, self.run = driver, driver.execute_script
        self.all = functools.partial(driver.find_elements, "css selector")
        self.pixels = functools.partial(self.read, ".pico-panel canvas", "toDataURL()")
        self.status = functools.partial(self.read, ".pico-status", "textContent")

    def open(self, address, width=1200, dark=False, height=900):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.set_scheme(dark)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get("about:blank")  # else a new hash alone does not load the page again
        self.driver.get(address)

    def set_scheme(self, dark):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def read(self, selector, wanted, place=0):
        frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        self.driver.execute_async_script(frames)  # two frames later everything asked for is drawn
        return self.run(f"return document.querySelectorAll('{selector}')[{place}].{wanted}")


@pytest.fixture
def tab(driver):
    driver.get_log("browser")
    yield Tab(driver)
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


BACKGROUND, WHITE = "return getComputedStyle(document.body).backgroundColor", "rgb(255, 255, 255)"
NO_OVERFLOW = "return document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    captures = captures_of({**SENTENCES, "Long": [" ".join(["one two three four"] * 32)]})
    path = tmp_path_factory.mktemp("explorer") / "attention_explorer.html"
    return pico.write_explorer(path, captures, make_study(2, 2).scores).as_uri()


def test_a_click_pins_a_token_escape_lets_go_and_keys_move(tab, explorer):
    from selenium.webdriver import ActionChains, Keys

    def point(element, x=0, y=0):
        ActionChains(tab.driver).move_to_element_with_offset(element, x, y).perform()
        return tab.status()

    def press(key):
        ActionChains(tab.driver).send_keys(key).perform()
        return tab.status()

    tab.open(f"{explorer}#0,5,0")  # sentence, token, head
    tokens, panel = tab.all(".pico-tokens button"), tab.all(".pico-panel canvas")[0]
    assert point(tokens[2]).startswith('sat looks at "sat"')  # head 0 of layer 0 looks at the token itself
    picture = tab.pixels()
    tokens[2].click()
    point(tokens[4])
    point(panel, 100, -100)  # a grey cell
    shown = point(panel, 0, 50)  # a cell of another token
    assert shown.startswith("sat looks at") and "pinned" in shown
    assert "looks at" in tab.all(".pico-tip")[0].text  # the cell under the pointer is still named
    assert "pinned" not in press(Keys.ESCAPE) and tab.pixels() == picture  # letting go moves nothing
    assert point(tokens[4]).startswith("the looks at") and tab.pixels() != picture
    assert point(panel, 100, -100).startswith("the looks at")  # a grey cell belongs to no token
    tab.run("document.querySelector('.pico-tokens').children[4].focus()")
    assert press(Keys.HOME).startswith("The looks at") and press(Keys.ARROW_RIGHT).startswith("cat looks at")
    picture = tab.pixels()
    assert press(Keys.ARROW_DOWN).endswith("(L0H1)") and tab.pixels() != picture
    assert press(Keys.ARROW_DOWN).endswith("(L1H0)") and press(Keys.ARROW_UP).endswith("(L0H1)")
    assert press(Keys.END).startswith(". looks at") and press(Keys.ARROW_LEFT).startswith("mat looks at")
    tab.run("document.querySelectorAll('.pico-thumbs button')[1].focus()")
    assert press(Keys.ARROW_DOWN).endswith("(L1H0)")
    assert tab.run("return document.activeElement.title").startswith("L1H0")  # the focus follows
    names = "return [...document.querySelectorAll('select, input')].map((e) => e.labels[0]?.textContent.trim())"
    assert all(tab.run(names))  # every control has a label


def test_sentences_two_heads_and_the_address(tab, explorer):
    from selenium.webdriver.support.ui import WebDriverWait

    tab.open(f"{explorer}#99,-3,7,x")  # nothing that exists
    assert "(L0H0)" in tab.status()  # the head with the highest score
    first = tab.pixels()
    tab.all(".pico-text option")[1].click()
    assert tab.status().startswith("cat looks at") and tab.pixels() != first
    tab.all(".pico-compare")[0].click()
    tab.all(".pico-panel")[1].click()
    tab.all(".pico-thumbs button")[3].click()
    assert all(figure.is_displayed() for figure in tab.all(".pico-panel"))
    assert "(L0H0)" in tab.status() and "(L1H1)" in tab.status() and tab.pixels(0) != tab.pixels(1)
    tab.all(".pico-tokens button")[2].click()
    address = WebDriverWait(tab.driver, 10).until(lambda driver: "#1,2," in driver.current_url and driver.current_url)
    shown = tab.status().removesuffix(" · pinned"), tab.pixels(0), tab.pixels(1)
    tab.open(address)
    assert (tab.status(), tab.pixels(0), tab.pixels(1)) == shown
    tab.all(".pico-drop")[0].click()
    assert '"The" 0%' in tab.status() and tab.pixels() != shown[1]


def test_every_sentence_opens_on_a_phone_in_light_and_dark(tab, explorer):
    seen = set()
    for number in range(5):
        tab.open(f"{explorer}#{number}", 390, dark=number % 3 == 1)
        assert tab.run(NO_OVERFLOW) and tab.run(BACKGROUND) == ("rgb(22, 24, 27)" if number % 3 == 1 else WHITE)
        assert min(thumb.size["width"] for thumb in tab.all(".pico-thumbs button")) > 24  # a finger can hit it
        assert max(canvas.rect["x"] + canvas.rect["width"] for canvas in tab.all("canvas")) <= 390
        seen.add(tab.pixels())
    assert len(seen) == 5
    tab.open(explorer, height=400)
    assert 300 < tab.all(".pico-panel canvas")[0].size["height"] <= 400  # it fits a small window
    light = tab.pixels()
    tab.set_scheme(dark=True)
    assert tab.pixels() != light  # repainted, since the grey of the future tokens differs


def test_copies_on_one_page_do_not_touch_each_other(tab, tmp_path):
    first, second = (pico.explorer_html(captures_of({"A": [text]})) for text in ("The cat sat.", "A dog ran away."))
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'>{first}<p>between</p>{second}", encoding="utf-8")
    tab.open(page.as_uri())
    before = tab.pixels(0), tab.pixels(2)
    tab.run("document.querySelectorAll('.pico-tokens')[1].children[0].click()")
    assert tab.pixels(0) == before[0] and tab.pixels(2) != before[1]
    assert tab.status(1).startswith("A looks at") and "pinned" not in tab.status(0)
    assert tab.run("return location.hash") == ""  # the notebook's address is its own


def test_report_loads_without_network_on_a_phone_in_light_and_dark(tab, report):
    glare = "return getComputedStyle(document.querySelector('figure img')).filter"
    tab.open(report[0].as_uri(), 390)
    assert (tab.run(BACKGROUND), tab.run(glare)) == (WHITE, "none")
    tab.open(report[0].as_uri(), 390, dark=True)
    assert tab.run(BACKGROUND) == "rgb(22, 24, 27)" and "brightness" in tab.run(glare)
    tab.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    loaded = "Promise.all([...document.images].map((image) => image.decode())).then(arguments[0])"
    assert tab.driver.execute_async_script(loaded)
    assert tab.run(NO_OVERFLOW)  # nothing sticks out at the side


def test_bertviz_takes_the_weights():
    bertviz = pytest.importorskip("bertviz", reason="needs bertviz: pip install --no-deps bertviz")
    capture = make_capture("The cat sat on the mat.")
    page = bertviz.head_view(list(capture.weights[:, None]), capture.labels, html_action="return")
    numbers = json.loads(re.search(r'"attn": (\[\[\[\[.*?\]\]\]\])', page.data, re.S)[1])
    np.testing.assert_allclose(np.array(numbers).squeeze(), capture.weights.numpy(), atol=1e-6)
