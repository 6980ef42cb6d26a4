"""Report and explorer: verdicts follow the evidence, every text is escaped, and the pages work in a real browser."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest
import torch
from study_data import make_capture, make_language, make_study

import pico_helpers as pico

SENTENCES = {
    "Simple": ["The cat sat on the mat.", "The dog saw the cat."],
    "Hostile": ["</script><script>alert(1)</script> & \"quotes\" 'too'", "日本 {{title}} 🎉"],
}


def verdicts(findings, topic):
    return {row["claim"]: row["verdict"] for row in findings["statements"] if row["topic"] == topic}


def explorer_data(page):
    return json.loads(re.search(r'class="pico-data">(.*?)</script>', page, re.S)[1])


def captures_of(sentences, n_layer=2, n_head=2):
    return {name: [make_capture(text, n_layer, n_head, k) for k, text in enumerate(t)] for name, t in sentences.items()}


# -- Findings


def test_verdicts_of_a_study_with_known_truth():
    findings = pico.study_findings(make_study(3, 4), make_language(), {"Model": "made up"})
    heads = verdicts(findings, "Heads")
    found = {claim for claim, verdict in heads.items() if verdict == "supported"}
    names = ("first token", "previous token", "last three", "(induction)")
    assert len(found) == len(names) and all(any(name in claim for claim in found) for name in names)
    assert list(verdicts(findings, "Classes").values()) == ["supported", "undecided", "not supported"]
    assert set(verdicts(findings, "Ablation").values()) == {"supported"}
    assert verdicts(findings, "Language")["The model handles subject and verb"] == "supported"
    assert findings["headline"][0].startswith("6 of 12 heads, 50.0% (47.0% to 53.0%), are specialised")
    assert findings["about"] == {"Model": "made up"}


def test_nothing_is_found_where_nothing_is():
    findings = pico.study_findings(make_study(3, 4, trained=False), make_language(trained=False))
    assert {row["verdict"] for row in findings["statements"]} <= {"not supported", "undecided"}
    assert "finds nothing" in findings["headline"][0]


def test_nothing_is_found_in_a_real_untrained_model():
    config = pico.ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=32, dropout=0.0)
    windows = torch.randint(0, 5000, (8, 64), generator=torch.Generator().manual_seed(0))
    study = pico.study_heads(pico.PicoLLM(config, seed=3), SENTENCES["Simple"], windows, n_bootstrap=50)
    findings = pico.study_findings(study)
    assert [row for row in findings["statements"] if row["verdict"] == "supported"] == []
    assert "finds nothing" in findings["headline"][0]


def test_a_share_within_the_untrained_range_is_no_finding():
    study = make_study(3, 4)
    untrained = study.shares["model"] == "untrained"
    special = study.shares["class"].isin(["Diagonal/Self", "Local Context", "Token-Specific", "Specialised"])
    study.shares.loc[untrained & special, "high"] = 1 / 2 - 0.01  # this model: 1/2, interval down to 1/2 - 0.03
    findings = pico.study_findings(study)
    assert next(iter(verdicts(findings, "Classes").values())) == "undecided"
    study.shares.loc[untrained & special, "high"] = 0.6
    assert next(iter(verdicts(pico.study_findings(study), "Classes").values())) == "not supported"
    assert len(verdicts(findings, "Ablation")) == 1  # no claim about a class that was not found


def test_classes_that_shuffling_changes_depend_on_word_order():
    study = make_study(3, 4)
    study.shares.loc[study.shares["model"] == "shuffled", ["share", "low", "high"]] = 0.0
    classes = verdicts(pico.study_findings(study), "Classes")
    assert classes["Which classes the heads fall into depends on the order of the words"] == "supported"


def single_heads(study):
    return verdicts(pico.study_findings(study), "Ablation")["Single heads matter for the prediction of held-out text"]


def test_single_heads_are_unimportant_only_where_the_data_exclude_it():
    study = make_study(3, 4)
    assert single_heads(study) == "supported"
    study.ablation["standard_error"] = 0.05
    assert single_heads(study) == "undecided"  # none stands out, any may matter
    study.ablation["loss_increase"] = 0.0005  # certain, but of no consequence
    study.ablation["standard_error"] = 1e-5
    assert single_heads(study) == "not supported"
    study.ablation.loc[0, "standard_error"] = 1e-3  # one head that was not measured well
    assert single_heads(study) == "undecided"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "supported"),
        ({"excess_low": -0.01}, "undecided"),  # other heads may matter as much
        ({"loss_increase": 1e-4, "low": -1e-3, "high": 1e-3 - 1e-6, "excess_low": 1e-5}, "not supported"),
        ({"loss_increase": 1e-4, "low": -1e-2, "high": 1e-2, "excess_low": -1e-2}, "undecided"),
        ({"n_random_sets": 0, "excess": np.nan, "excess_low": np.nan}, "undecided"),
    ],
)
def test_a_class_matters_if_its_heads_together_cost_more_than_others(changes, expected):
    study = make_study(3, 4)
    study.ablation["loss_increase"] = 0.0  # each of the heads alone can be spared
    study.class_ablation[list(changes)] = list(changes.values())
    findings = pico.study_findings(study)
    assert (
        verdicts(findings, "Ablation")["Local Context heads matter for the prediction, more than as many others"]
        == expected
    )
    evidence = next(row["evidence"] for row in findings["statements"] if row["claim"].startswith("Local Context heads"))
    assert f"{study.class_ablation['high'].iloc[0]:.4f}" in evidence
    assert ("too few others" in evidence) == (changes.get("n_random_sets") == 0)
    assert findings["class_ablation"][0]["n_heads"] == 2


def test_findings_are_strict_json_with_every_number(tmp_path):
    study = make_study(2, 2)
    study.scores.loc[0, "induction"] = np.nan
    findings = pico.study_findings(study, make_language())
    path = pico.write_findings(tmp_path / "findings.json", findings)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == findings
    assert read["head_scores"][0]["induction"] is None
    assert read["head_scores"][1]["previous"] == pytest.approx(study.scores.loc[1, "previous"])
    assert read["thresholds"]["tau"]["sink"] == 0.3 and read["thresholds"]["null_attention"] == pico.NULL_ATTENTION
    assert [read["settings"][f"language_{name}"] for name in ("n_items", "n_heads", "n_draws")] == [40, 2, 4]
    assert len(read["class_shares"]) == len(study.shares) and len(read["language"]) == 5


# -- The report


class Page(html.parser.HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    study, language = make_study(2, 2), make_language()
    language.loc[0, "claim"] = "<b>claims</b> are & stay text"
    pictures = pico.draw_study(captures_of(SENTENCES), study, language, folder / "figures")
    findings = pico.study_findings(study, language, {"Corpus": "<i>offline</i> {{headline}}"})
    return pico.write_report(folder / "attention_report.html", findings, pictures), pictures, findings


def test_report_is_one_page_with_every_picture_described(report):
    path, pictures, findings = report
    page = Page(path.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert {image["alt"] for image in images} == {picture.alt for picture in pictures}
    assert all(base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG") for image in images)
    links = [a.get("src", a.get("href", "")) for _, a in page.elements if "src" in a or "href" in a]
    assert all(link.startswith("data:") for link in links)
    words = " ".join("".join(page.words).split())
    for row in findings["statements"]:
        assert " ".join(row["claim"].split()) in words and " ".join(row["evidence"].split()) in words
    assert all(line in words for line in findings["headline"])
    limits = "tau, previous", "significance", "null_accuracy", "null_attention", "null_margin", "min_loss_increase"
    for term in (*limits, "language_n_items", "85.7%", "uniform head", "untrained models", "Kappa"):
        assert term in words


def test_report_escapes_every_text(report):
    text = report[0].read_text(encoding="utf-8")
    tags = {tag for tag, _ in Page(text).elements}
    assert "script" not in tags and "b" not in tags and "i" not in tags
    assert "&lt;b&gt;claims&lt;/b&gt; are &amp; stay text" in text
    assert "&lt;i&gt;offline&lt;/i&gt; {{headline}}" in text  # a text that looks like a template is not filled


# -- The explorer


def test_explorer_holds_every_weight_to_a_256th():
    captures = captures_of(SENTENCES, 3, 2)
    data = explorer_data(pico.explorer_html(captures, ["Mixed"] * 6))
    assert (data["nLayer"], data["nHead"], data["classes"]) == (3, 2, ["Mixed"] * 6)
    flat = [capture for members in captures.values() for capture in members]
    assert [text["text"] for text in data["texts"]] == [capture.text for capture in flat]
    for text, capture in zip(data["texts"], flat, strict=True):
        n = len(capture.labels)
        packed = np.frombuffer(zlib.decompress(base64.b64decode(text["maps"])), np.uint8).reshape(3, 2, -1)
        weights = np.zeros((3, 2, n, n))
        weights[:, :, np.tri(n, dtype=bool)] = packed / 255
        np.testing.assert_allclose(weights, capture.weights.numpy(), atol=0.5 / 255 + 1e-6)


def test_explorer_of_the_whole_study_is_small(tmp_path):
    path = pico.write_explorer(tmp_path / "explorer.html", captures_of(pico.ALL_TEST_CATEGORIES, 8, 7))
    assert path.stat().st_size < 2_000_000
    assert len(explorer_data(path.read_text(encoding="utf-8"))["texts"]) >= 50


def test_explorer_escapes_hostile_text_and_has_no_ids():
    page = pico.explorer_html(captures_of(SENTENCES))
    elements = Page(page).elements
    assert [tag for tag, _ in elements].count("script") == 2
    assert not any("id" in attributes or attributes.get("name") for _, attributes in elements)
    assert pico.explorer_html(captures_of(SENTENCES)["Simple"])  # a list of sentences does as well
    with pytest.raises(pico.PicoError, match="at least one sentence"):
        pico.explorer_html({})


# -- In a browser without a network


def _find(*names):
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="browser tests need selenium: pip install selenium")
    chromium, driver = _find("chromium", "chromium-browser", "google-chrome"), _find("chromedriver")
    if not (chromium and driver):
        pytest.skip("browser tests need Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no name resolves: the network is cut
    options.add_argument("--window-size=1200,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


def open_page(browser, path, dark=False):
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get_log("browser")
    browser.get(path.as_uri())
    wait_for(browser, "return document.readyState === 'complete'")


def wait_for(browser, script, seconds=10):
    end = time.time() + seconds
    while not (value := browser.execute_script(script)):
        assert time.time() < end, f"never true: {script}"
        time.sleep(0.02)
    return value


def settle(browser):
    """Two frames, after which everything asked for is drawn."""
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")


def pixels(browser, name, copy=0):
    settle(browser)
    script = "return document.querySelectorAll(arguments[0])[arguments[1]].toDataURL()"
    return browser.execute_script(script, f".pico-{name}", copy)


def text_of(browser, name, copy=0):
    settle(browser)
    return browser.execute_script(f"return document.querySelectorAll('.pico-{name}')[{copy}].textContent")


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


STARTED = "return [...document.querySelectorAll('.pico-explorer')].every((e) => e.querySelector('.pico-tokens button'))"


@pytest.fixture(scope="module")
def explorer(browser, tmp_path_factory):
    captures = captures_of({**SENTENCES, "Long": [" ".join(["one two three four"] * 32)]})
    return pico.write_explorer(tmp_path_factory.mktemp("explorer") / "attention_explorer.html", captures, ["Mixed"] * 4)


def test_pointing_at_a_token_changes_what_is_drawn(browser, explorer):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    open_page(browser, explorer)
    wait_for(browser, STARTED)
    before = pixels(browser, "map"), pixels(browser, "all"), text_of(browser, "status")
    token = browser.find_elements(By.CSS_SELECTOR, ".pico-tokens button")[2]
    ActionChains(browser).move_to_element(token).perform()
    after = pixels(browser, "map"), pixels(browser, "all"), text_of(browser, "status")
    assert all(old != new for old, new in zip(before, after, strict=True))
    # head 0 of layer 0 looks at the token itself
    assert after[2].startswith("·sat in layer 0, head 0 (Mixed) looks at: ·sat")
    map_of_head = browser.find_element(By.CSS_SELECTOR, ".pico-map")
    ActionChains(browser).move_to_element_with_offset(map_of_head, -100, -20).perform()
    assert "; at " in text_of(browser, "status")  # the cell under the pointer
    assert errors(browser) == []


def test_keys_move_over_tokens_and_heads(browser, explorer):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def press(key):
        browser.switch_to.active_element.send_keys(key)
        return text_of(browser, "status")

    open_page(browser, explorer)
    wait_for(browser, STARTED)
    browser.find_element(By.CSS_SELECTOR, ".pico-tokens [tabindex='0']").send_keys(Keys.NULL)
    assert press(Keys.HOME).startswith("The in layer 0, head 0")
    assert press(Keys.ARROW_RIGHT).startswith("·cat in layer 0, head 0")
    picture = pixels(browser, "map")
    assert press(Keys.ARROW_DOWN).startswith("·cat in layer 0, head 1")
    assert pixels(browser, "map") != picture
    assert press(Keys.ARROW_DOWN).startswith("·cat in layer 1, head 0")
    assert press(Keys.ARROW_UP).startswith("·cat in layer 0, head 1")
    assert press(Keys.END).startswith(". in layer 0, head 1")
    names = "return [...document.querySelectorAll('select, input')].map((e) => e.labels[0]?.textContent.trim())"
    assert all(browser.execute_script(names))  # every control has a label
    assert errors(browser) == []


def test_every_sentence_and_both_views_open(browser, explorer):
    open_page(browser, explorer)
    wait_for(browser, STARTED)
    choose = "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
    choose += "e.dispatchEvent(new Event('change'))"
    seen = {pixels(browser, "map")}
    for number, text in enumerate((SENTENCES["Simple"] + SENTENCES["Hostile"])[1:], start=1):
        browser.execute_script(choose, ".pico-text", str(number))
        labels = json.dumps(explorer_data(explorer.read_text(encoding="utf-8"))["texts"][number]["labels"])
        shown = "return [...document.querySelectorAll('.pico-tokens button')].map((e) => e.textContent)"
        wait_for(browser, f"return JSON.stringify((() => {{ {shown} }})()) === JSON.stringify({labels})")
        seen.add(pixels(browser, "map"))
        assert text
    assert len(seen) == 4
    heads = pixels(browser, "all")
    browser.execute_script(choose, ".pico-view", "maps")
    maps = pixels(browser, "all")
    browser.execute_script("document.querySelector('.pico-drop').click()")
    assert len({heads, maps, pixels(browser, "all")}) == 3
    assert errors(browser) == []


def test_128_tokens_are_drawn_within_a_frame_or_two(browser, tmp_path):
    capture = make_capture(" ".join(["one two three four"] * 32), 8, 7)
    assert len(capture.labels) == 128
    open_page(browser, pico.write_explorer(tmp_path / "long.html", {"Long": [capture]}))
    wait_for(browser, STARTED)
    script = """
      const done = arguments[0], tokens = document.querySelectorAll(".pico-tokens button"), start = performance.now();
      let step = 0;
      const next = () => {
        if (step === 30) return done((performance.now() - start) / 30);
        tokens[step++ * 4].dispatchEvent(new PointerEvent("pointerenter"));
        requestAnimationFrame(next);
      };
      next();"""
    assert browser.execute_async_script(script) < 60  # milliseconds a move; a test machine draws without a GPU
    assert errors(browser) == []


def test_light_and_dark_follow_the_system(browser, explorer, report):
    for path in (explorer, report[0]):
        backs = []
        for dark in (False, True):
            open_page(browser, path, dark)
            color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            backs.append(sum(map(int, re.findall(r"\d+", color)[:3])))
        assert backs[0] > 700 and backs[1] < 120
    open_page(browser, explorer)
    wait_for(browser, STARTED)
    light = pixels(browser, "map")
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    assert pixels(browser, "map") != light  # repainted, since the grey of the future tokens differs


def test_copies_on_one_page_do_not_touch_each_other(browser, tmp_path):
    first, second = (pico.explorer_html(captures_of({"A": [text]})) for text in ("The cat sat.", "A dog ran away."))
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'>{first}<p>between</p>{second}", encoding="utf-8")
    open_page(browser, page)
    wait_for(browser, STARTED)
    before = pixels(browser, "map", 0), pixels(browser, "map", 1)
    token = "document.querySelectorAll('.pico-tokens')[1].children[1]"
    browser.execute_script(f"{token}.dispatchEvent(new PointerEvent('pointerenter'))")
    assert pixels(browser, "map", 0) == before[0]
    assert pixels(browser, "map", 1) != before[1]
    assert text_of(browser, "status", 1).startswith("·dog in")
    assert errors(browser) == []


def test_report_loads_without_network_and_shows_every_picture(browser, report):
    open_page(browser, report[0])
    script = "return [...document.images].every((i) => i.complete && i.naturalWidth > 200)"
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    wait_for(browser, script)
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(wide)  # nothing sticks out at the side
    assert errors(browser) == []


# -- Other people's viewers take the weights as they are


@pytest.fixture(scope="module")
def real_capture():
    config = pico.ModelConfig(d_model=32, n_layer=2, n_head=2, d_ff=32)
    return pico.capture_attention(pico.PicoLLM(config), "The cat sat on the mat.")


def test_bertviz_takes_the_weights(real_capture):
    bertviz = pytest.importorskip("bertviz", reason="needs bertviz: pip install --no-deps bertviz")
    page = bertviz.head_view(list(real_capture.weights[:, None]), real_capture.labels, html_action="return")
    numbers = json.loads(re.search(r'"attn": (\[\[\[\[.*?\]\]\]\])', page.data, re.S)[1])
    np.testing.assert_allclose(np.array(numbers).squeeze(), real_capture.weights.numpy(), atol=1e-6)


def test_circuitsvis_takes_the_weights(real_capture):
    pytest.importorskip("circuitsvis", reason="needs circuitsvis: pip install --no-deps circuitsvis importlib_metadata")
    from circuitsvis.attention import attention_patterns

    shown = str(attention_patterns(tokens=real_capture.labels, attention=real_capture.weights[1]))
    assert "AttentionPatterns" in shown and "·cat" in dataclasses.replace(real_capture).labels
