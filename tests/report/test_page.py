"""The report: every number of results.json, nothing from outside, nothing executable, no crash."""

import base64
import csv
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from mmrjax import methods
from mmrjax.report import __main__ as program
from mmrjax.report import files, tables, words
from mmrjax.report import page as report
from mmrjax.report import pictures as visualize

HOSTILE = "<script>alert('x')</script>|`[a](http://evil.example)"
METRICS = list(tables.METRICS)
KEY = "toy/part"
VOID = {"meta", "link", "img", "br", "rect", "circle", "hr", "input"}


# A work directory as a run writes it: two methods, domains and seeds, nulls with reasons.


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_scores(folder, score, is_anomaly, domain):
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "domain", "defect", "group", "score"])
        for i, (s, a, d) in enumerate(zip(score, is_anomaly, domain, strict=True)):
            label = "anomaly" if a else "good"
            writer.writerow([HOSTILE if i == 0 else f"id{i}", label, d, label, i, repr(float(s))])


def write_run(root, method, category, seed, random=False, notes=()):
    folder = root / method / category / f"seed{seed}"
    rng = np.random.default_rng(seed)
    n, size = 60, 16
    is_anomaly = np.arange(n) % 2 == 0
    domain = np.where(np.arange(n) < 30, "same", "view")
    maps = rng.random((n, size, size), np.float32)
    masks = np.zeros((n, size, size), bool)
    masks[is_anomaly, 3:7, 3:7] = True
    maps[masks] += 0.5
    score = maps.max(axis=(1, 2))
    table = {
        "id": [HOSTILE if i == 0 else f"id{i}" for i in range(n)],
        "label": np.where(is_anomaly, "anomaly", "good"),
        "domain": domain,
        "defect": np.where(is_anomaly, "groove", "good"),
        "score": score + 9.0 * (np.arange(n) == 0),  # the hostile id is in every gallery
        "has_mask": np.ones(n, bool),
    }
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    scale = visualize.fixed_scale(maps)
    visualize.write_gallery(folder / "maps", images, maps, masks, table, scale, 3)
    write_scores(folder, score, is_anomaly, domain)
    if method == "mmr":
        log = [{"step": s, "epoch": s // 4, "loss": 3.0 / (1 + s)} for s in range(40)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    roc = {"fpr": [0.0, 0.1, 1.0], "tpr": [0.0, 0.8, 1.0]}
    pro = {"fpr": [0.0, 0.2, 0.4], "pro": [0.0, 0.6, 0.9]}
    all_curves = {"roc": roc} if method == "patchcore" else {"roc": roc, "pro": pro}
    write_json(folder / "curves.json", {"all": all_curves, "same": {"roc": roc}, "view": {}})
    write_json(folder / "config.json", {"method": {"name": method}, "note": HOSTILE})
    teacher = {"name": "resnet18", "source": "file", "sha256": "ab" * 32, "licence": "ImageNet"}
    facts = {
        "versions": {"jax": "0.10.0"},
        "device": "cpu",
        "teacher": teacher | {"random": random},
        "student": {},
        "parameters": {"student": 5_731_264},
        "seconds": {"data": 1.25, "train": 2.5},
        "notes": list(notes),
        "command": "python -m mmrjax.main --config=configs/demo.py",
    }
    write_json(folder / "results.json", {"schema": 1, "seed": seed, "facts": facts})
    return {"category": category, "seed": seed, "path": f"{method}/{category}/seed{seed}"}


def measured(rng, name):
    seeds = {"54": float(rng.random()), "55": float(rng.random())}
    mean, std = float(np.mean(list(seeds.values()))), float(np.std(list(seeds.values()), ddof=1))
    return {"mean": mean, "std": std, "ci95": sorted(rng.random(2).tolist()), "seeds": seeds}


def aggregate_of(runs_of, keys, rng):
    methods = {}
    for method, runs in runs_of.items():
        metrics = {}
        for key in keys:
            domains = {}
            for domain in ("all", "same", "view"):
                values = {name: measured(rng, name) for name in METRICS}
                values["counts"] = {"good": 30, "anomaly": 30, "pixel_images": 41, "empty_masks": 0}
                values["reasons"] = {}
                if method == "patchcore":
                    values["pro_mmr"] = None
                    values["reasons"]["pro_mmr"] = "no <b>pixel</b> ground truth"
                domains[domain] = values
            metrics[key] = domains
        summary = {}
        for name in METRICS:
            mean, std, worst, gap = rng.random(4).tolist()
            where = f"{keys[-1]}/view"
            worst = {"value": worst, "where": where}
            summary[name] = {"mean": mean, "std": std, "worst": worst, "gap_to_reference": -gap}
        methods[method] = {"metrics": metrics, "summary": summary, "runs": runs, "notes": []}
    pair = {"a": "mmr", "b": "patchcore", "key": keys[0]}
    comparisons = [
        pair | {"metric": "image_auroc", "difference": -0.0512, "ci95": [-0.0904, -0.0121]},
        pair | {"metric": "aupro_0.3", "difference": 0.0307, "ci95": [-0.0143, 0.0766]},
    ]
    return {
        "schema": 1,
        "title": f"Toy parts {HOSTILE}",
        "dataset": "toy",
        "methods": methods,
        "comparisons": comparisons,
        "reference_domain": "same",
    }


def fake_workdir(root, categories=("part",), random=False, notes=()):
    runs = {
        method: [
            write_run(root, method, category, seed, random, notes)
            for category in categories
            for seed in (54, 55)
        ]
        for method in ("mmr", "patchcore")
    }
    keys = [f"toy/{category}" for category in categories]
    aggregate = aggregate_of(runs, keys, np.random.default_rng(0))
    write_json(root / "results.json", aggregate)
    return aggregate


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("workdir")
    fake_workdir(root)
    path = report.write_report(root, methods.METHODS)
    assert path == root / "report.html"
    aggregate, _ = files.read_workdir(root, methods.METHODS)
    return aggregate, path.read_text(encoding="utf-8"), (root / "report.md").read_text("utf-8")


class Page(html.parser.HTMLParser):
    """Collects elements and text; fails on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text += " "
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def numbers_of(aggregate):
    """Every fraction of results.json with its place."""
    for method, content in aggregate["methods"].items():
        for domain, values in content["metrics"][KEY].items():
            for name in METRICS:
                one = values[name] or {}
                found = [one.get("mean"), one.get("std"), *(one.get("ci95") or [])]
                for value in [*found, *(one.get("seeds") or {}).values()]:
                    yield f"{method} {domain} {name}", value
        for name, one in content["summary"].items():
            for value in (one["mean"], one["std"], one["worst"]["value"], one["gap_to_reference"]):
                yield f"{method} summary {name}", value
    for one in aggregate["comparisons"]:
        for value in (one["difference"], *one["ci95"]):
            yield "comparison", abs(value)


# What the page says


def test_every_number_of_results_json_stands_on_the_page_in_percent(rendered):
    aggregate, text, _ = rendered
    shown = set(re.findall(r"[\d.]+", Page(text).text))
    missing = [
        (place, value)
        for place, value in numbers_of(aggregate)
        if value is not None and f"{100 * abs(value):.1f}" not in shown
    ]
    assert missing == []


def test_every_mean_and_interval_stands_in_its_row_of_both_reports(rendered):
    aggregate, text, markdown = rendered
    rows = [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)]
    for content in aggregate["methods"].values():
        for values in content["metrics"][KEY].values():
            cells = [values[name] for name in METRICS if values[name]]
            wanted = [f"{100 * c['mean']:.1f}" for c in cells]
            wanted += [f"{100 * c['ci95'][0]:.1f}–{100 * c['ci95'][1]:.1f}" for c in cells]
            for lines in (rows, markdown.splitlines()):
                assert any(all(number in line for number in wanted) for line in lines)


def test_counts_stand_beside_the_metrics(rendered):
    _, text, markdown = rendered
    assert "30 / 30" in Page(text).text
    assert "41 with pixel truth" in Page(text).text
    assert "30 / 30" in markdown


def test_undefined_metric_is_a_dash_with_its_reason(rendered):
    _, text, markdown = rendered
    page = Page(text)
    assert "no <b>pixel</b> ground truth" in page.text
    links = [a for a in page.all("a") if a.get("title") == "no <b>pixel</b> ground truth"]
    assert len(links) == 3, "one dash per domain of PatchCore"
    assert {a["href"] for a in links} == {"#note-1"}
    assert "note-1" in [a.get("id") for a in page.all("li")]
    assert "– [1]" in markdown
    assert "no &lt;b&gt;pixel" in markdown


def test_contents_stand_in_the_promised_order(rendered):
    _, text, _ = rendered
    sections = [a["id"] for a in Page(text).all("section")]
    wanted = ["answer", "table", "comparisons", "training", "curves", "scores", "pictures"]
    assert sections == [*wanted, "protocol", "facts"]


def test_header_names_data_set_seeds_and_teacher(rendered):
    _, text, _ = rendered
    head = " ".join(Page(text).text.split("Results in percent")[0].split())
    assert "toy" in head
    assert "54, 55" in head
    assert "resnet18 (file)" in head


def test_facts_hold_weights_licence_parameters_seconds_and_command(rendered):
    _, text, markdown = rendered
    for page in (Page(text).text, markdown):
        for fact in ("ab" * 32, "ImageNet", "5,731,264", "python -m mmrjax.main", "2.5", "0.10.0"):
            assert fact in page


def test_methods_have_curves_histograms_and_only_the_trained_one_a_loss(rendered):
    _, text, _ = rendered
    labels = [a["aria-label"] for a in Page(text).all("svg")]
    assert [label for label in labels if "loss" in label] == ["MMR: training loss"]
    assert sum("ROC curve" in label for label in labels) == 2
    assert [label for label in labels if "PRO curve" in label] == ["MMR: PRO curve per domain"]
    assert sum("anomaly scores" in label for label in labels) == 2
    assert sum(label.startswith("Colour scale") for label in labels) == 2


def test_gallery_shows_picture_truth_and_map_of_every_item_of_the_first_seed(rendered):
    _, text, _ = rendered
    page = Page(text)
    assert len(page.all("figure")) == 2 * 9
    pictures = page.all("img")
    good = page.text.count("good: nothing to outline")
    assert len(pictures) == 3 * 18 - good
    assert 0 < good < 18
    assert all(a["src"].startswith("data:image/webp;base64,") and a["alt"] for a in pictures)


# Self-contained and safe


def test_page_requests_nothing_from_outside(rendered):
    _, text, _ = rendered
    for _, attributes in Page(text).elements:
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert "url(" not in (attributes.get("style") or "")
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_hostile_text_is_shown_and_never_run(rendered):
    _, text, markdown = rendered
    page = Page(text)
    assert page.all("script") == [{}]
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, "the policy lets our script run and no other"
    assert text.count("<script") == 1
    assert HOSTILE not in script
    assert page.text.count(HOSTILE) >= 3, "title, gallery and configuration"
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "<script" not in markdown
    assert re.search(r"(?<!\\)\]\(http", markdown) is None, "no link of its own"


def test_page_has_a_viewport_and_styles_for_dark_phone_and_print(rendered):
    _, text, _ = rendered
    assert any(a.get("name") == "viewport" for a in Page(text).all("meta"))
    for query in ("prefers-color-scheme: dark", "max-width: 560px", "@media print"):
        assert query in text


# Banners


@pytest.mark.parametrize("random", [True, False])
def test_banner_shouts_exactly_when_the_teacher_is_random(tmp_path, random):
    fake_workdir(tmp_path, random=random)
    text = report.write_report(tmp_path, methods.METHODS).read_text("utf-8")
    alarms = [a for a in Page(text).all("div") if a.get("id") == "random-teacher"]
    assert len(alarms) == random
    markdown = (tmp_path / "report.md").read_text("utf-8")
    assert ("THE TEACHER IS RANDOM" in markdown) == random


def test_notes_of_runs_and_methods_are_shown_once_with_their_methods(tmp_path, rendered):
    assert not any(a.get("id") == "notes" for a in Page(rendered[1]).all("div"))
    aggregate = fake_workdir(tmp_path, notes=["few images"])
    aggregate["methods"]["patchcore"]["notes"] = ["odd method"]
    write_json(tmp_path / "results.json", aggregate)
    page = Page(report.write_report(tmp_path, methods.METHODS).read_text("utf-8"))
    assert page.text.count("MMR, PatchCore: few images") == 1
    assert page.text.count("PatchCore: odd method") == 1


# Missing pieces


def test_run_without_any_of_its_files_is_reported_with_what_is_left_out(tmp_path):
    fake_workdir(tmp_path)
    folder = tmp_path / "mmr" / "part" / "seed54"
    for name in ("metrics.jsonl", "scores.csv", "curves.json", "config.json", "results.json"):
        (folder / name).unlink()
    (folder / "maps" / "gallery.json").write_text('{"scale": [0')
    (tmp_path / "patchcore/part/seed54/maps/000_heat.png").unlink()
    (tmp_path / "patchcore/part/seed54/maps/001_image.png").write_bytes(b"not a picture")
    page = Page(report.write_report(tmp_path, methods.METHODS).read_text("utf-8"))
    assert "mmr/part/seed54: scores.csv is absent" in page.text
    assert "mmr/part/seed54: maps/gallery.json cannot be read" in page.text
    assert "patchcore/part/seed54: maps/000_heat.png is absent or damaged" in page.text
    assert page.text.count("picture missing") == 2
    assert "No pictures were written" in page.text
    assert "finds" not in page.text.split("PatchCore")[0], "no scores, no detection rate"


def test_last_log_line_cut_by_a_killed_run_is_dropped(tmp_path):
    fake_workdir(tmp_path)
    with open(tmp_path / "mmr/part/seed54/metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    page = Page(report.write_report(tmp_path, methods.METHODS).read_text("utf-8"))
    assert "metrics.jsonl" not in page.text
    assert "MMR: training loss" in [a["aria-label"] for a in page.all("svg")]


def test_run_with_good_images_only_says_so(tmp_path):
    aggregate = fake_workdir(tmp_path)
    for content in aggregate["methods"].values():
        for values in content["metrics"][KEY].values():
            values |= dict.fromkeys(METRICS)
            values["reasons"] = dict.fromkeys(METRICS, "only good images")
        content["summary"] = {}
    aggregate["comparisons"] = []
    write_json(tmp_path / "results.json", aggregate)
    for run in aggregate["methods"]["mmr"]["runs"] + aggregate["methods"]["patchcore"]["runs"]:
        folder = tmp_path / run["path"]
        write_scores(folder, np.linspace(0, 1, 30), np.zeros(30, bool), ["same"] * 30)
        write_json(folder / "curves.json", {"all": {}, "same": {}})
    page = Page(report.write_report(tmp_path, methods.METHODS).read_text("utf-8"))
    assert "MMR: image AUROC is undefined here (only good images)." in page.text
    assert "No curves" in page.text
    assert "30 good, 0 defective" in page.text


def test_missing_or_damaged_aggregate_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no results\.json in"):
        report.write_report(tmp_path, methods.METHODS)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        report.write_report(tmp_path, methods.METHODS)
    assert program.main([f"--workdir={tmp_path}"]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_rendering_again_from_the_command_line_gives_the_same_page(tmp_path, capsys):
    fake_workdir(tmp_path)
    first = report.write_report(tmp_path, methods.METHODS).read_bytes()
    assert program.main([f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == first
    assert not list(tmp_path.glob("*.part"))


def test_an_unknown_method_goes_by_its_name_and_departs_from_nothing(tmp_path):
    fake_workdir(tmp_path)
    known = Page(report.write_report(tmp_path, methods.METHODS).read_text("utf-8")).text
    assert "PatchCore" in known
    assert "Unlike the paper's model" in known
    unknown = Page(report.write_report(tmp_path, {}).read_text("utf-8")).text
    assert "PatchCore" not in unknown
    assert "patchcore finds" in unknown
    assert "Unlike the paper's model" not in unknown


# Several categories, size


def test_several_categories_fold_away_and_share_the_byte_budget(tmp_path, monkeypatch):
    names = ("bolt", "nut", "washer")
    fake_workdir(tmp_path, categories=names)
    full = report.write_report(tmp_path, methods.METHODS).read_text("utf-8")
    page = Page(full)
    folded = [a for a in page.all("details") if a.get("class") == "category"]
    assert len(folded) == 3
    assert all("open" not in a for a in folded)
    assert len(page.all("figure")) == 3 * 2 * 9
    assert "mean over 3 categories" in page.text
    monkeypatch.setattr(files, "PICTURE_SIZES", ((288, 84), (4, 10)))
    per_category = sum(len(a["src"]) for a in page.all("img")) // 3
    monkeypatch.setattr(report, "PAGE_BYTES", 2 * per_category)  # enough for two, not for three
    small = report.write_report(tmp_path, methods.METHODS).read_text("utf-8")
    assert len(small) < len(full)
    assert len(Page(small).all("figure")) == 3 * 2 * 9, "smaller pictures, not fewer"


# Words and numbers


def test_shift_cost_is_domain_minus_reference_in_points(rendered):
    aggregate, _, _ = rendered
    table = tables.shift_costs(aggregate)[0]
    metrics = aggregate["methods"]["mmr"]["metrics"][KEY]
    assert [row.label for row in table.rows] == ["view"]
    cost = 100 * (metrics["view"]["image_auroc"]["mean"] - metrics["same"]["image_auroc"]["mean"])
    assert float(table.rows[0].cells[0].text.replace("−", "-")) == pytest.approx(cost, abs=0.051)


def test_answer_quotes_the_pooled_row_and_the_weakest_domain(rendered):
    aggregate, _, _ = rendered
    metrics = aggregate["methods"]["mmr"]["metrics"][KEY]
    text = " ".join(words.answer(aggregate, "mmr", 0.6131))
    assert text.startswith("MMR finds 61.3 % of the defective images when 5 % of the good ones")
    assert f"{100 * metrics['all']['image_auroc']['mean']:.1f} ± " in text
    weakest = min(("same", "view"), key=lambda d: metrics[d]["image_auroc"]["mean"])
    assert f"weakest in the domain “{weakest}”" in text
