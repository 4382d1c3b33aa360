"""The page of the report in a browser: it works, it fits, and nothing that a model wrote runs in it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from chromium import BROWSER, Page
from fabricated import HOSTILE, alarm, data_of, fabricate, group, write_alarms, write_table

from trl_grpo_ext.observe.report import read_run, write_report
from trl_grpo_ext.observe.report.page import render


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    config = {"beta": 0.1, "run_name": HOSTILE[0], HOSTILE[1]: HOSTILE[2], "logging_dir": HOSTILE[6]}
    info = {"config": config, "versions": {HOSTILE[0]: HOSTILE[2]}, "model": HOSTILE[2], "num_processes": HOSTILE[1]}
    folder = fabricate(tmp_path / "<img src=x onerror=alert(9)>", **info)
    metrics = folder / "monitor" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        line |= {f"rewards/{text}/mean": 0.5 for text in HOSTILE[:5]} | dict.fromkeys(HOSTILE, 1.0)
        line |= {"__proto__": 1.0, "rewards/__proto__/mean": 0.1, "constructor": 2.0}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [
        {"step": step, "row": row, "question": text, "answer": text, "scores": dict.fromkeys(["total", *HOSTILE], step)}
        for step in (10, 40)
        for row, text in enumerate(HOSTILE)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    texts = {key: " ".join(HOSTILE) for key in ("evidence", "cause", "remedy", "action")}
    write_alarms(folder, *(alarm(i + 1, name=text, **texts) for i, text in enumerate(HOSTILE)))
    clean = [text.replace("\ud800", "") for text in HOSTILE]
    for step in (10, 20, 40):
        rows = [row for text in clean for row in group(f"{step} {text}", [0.1, 0.9, 0.5], [text, f"b{text}", "c"])]
        rows += group(f"{step} flat", [0.5, 0.5])
        write_table(
            folder, step, [{**row, **dict.fromkeys(clean[:6], row["advantage"]), "note": clean[0]} for row in rows]
        )
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
@pytest.mark.parametrize("compare", [False, True])
def test_nothing_that_a_model_wrote_runs(hostile_run, tmp_path, compare):
    page_file = write_report(hostile_run, tmp_path / "report.html", compare=hostile_run if compare else None)
    with Page() as page:
        page.open(page_file)
        for step in ("details", "details"):  # groups are filled when they open
            page.run(f"document.querySelectorAll('{step}').forEach((node) => node.open = true)")
        page.run("document.querySelectorAll('.plot svg').forEach((node) => node.dispatchEvent("
                 "new PointerEvent('pointermove', {clientX: 100, clientY: 10})))")  # fmt: skip
        page.run("new Promise((done) => setTimeout(done, 500))")
        assert page.run("typeof window.pwned") == "undefined"
        assert page.named("Page.javascriptDialogOpening") == []
        assert [request["request"]["url"] for request in page.named("Network.requestWillBeSent")] == [
            page_file.resolve().as_uri()
        ]
        assert page.named("Runtime.exceptionThrown") == []
        assert page.named("Log.entryAdded") == []
        assert page.run("document.scripts.length") == 2
        assert page.run("document.querySelectorAll('img, iframe, a, link, object, embed, base').length") == 0
        # The text is there, as text, with what is invisible spelled out.
        assert page.run("document.body.innerText").count('<img src="x" onerror="window.pwned = 2">') > 5
        shown = page.run("document.getElementById('list').textContent")
        assert "⟨U+202E⟩gnissim⟨U+202C⟩ ␛[2J␀␇⟨U+2028⟩⟨U+2066⟩" in shown
        assert "\u202e" not in page.run("document.documentElement.textContent")
        # Were something to get through all the same, the policy of the page would stop it.
        page.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 9'}))")
        page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 10\">')")
        page.run("new Promise((done) => setTimeout(done, 300))")
        assert page.run("typeof window.pwned") == "undefined"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_plots_table_and_filters_work(tmp_path):
    folder = fabricate(tmp_path / "run")
    write_alarms(
        folder, alarm(20, name="kl_spike"), alarm(25, name="kl_spike", state="cleared"), alarm(30, name="flat")
    )
    for step in (10, 40):
        rows = group(f"apple {step}", [0.1, 0.9, 0.4]) + group(f"pear {step}", [0.5, 0.5])
        write_table(folder, step, rows + [row for i in range(20) for row in group(f"many {step} {i}", [0.0, 0.1 + i])])
    page_file = write_report(folder)
    assert page_file == folder / "report.html"

    def found(page) -> tuple[int, list[str]]:
        titles = page.run("[...document.querySelectorAll('.group .what')].map((node) => node.textContent)")
        return int(page.run("document.getElementById('found').textContent").split()[0]), titles

    def choose(page, name: str, value: str) -> None:
        page.run(f"document.getElementById('{name}').value = {value!r}")
        page.run(f"document.getElementById('{name}').dispatchEvent(new Event('input'))")

    with Page() as page:
        page.open(page_file)
        assert page.named("Runtime.exceptionThrown") == []
        panels = [panel for panel in data_of(page_file)["panels"] if not panel["is_extra"]]
        assert len(panels) > 10
        assert "Never moved: " in page.run("document.getElementById('constants').textContent")
        assert page.run("document.querySelectorAll('#panels svg[role=img]').length") == len(panels)
        empty = (
            "[...document.querySelectorAll('#panels svg[role=img]')].filter((svg) => !svg.querySelector('polyline'))"
        )
        assert page.run(f"{empty}.length") == 0
        assert page.run("document.querySelector('#panels polyline').points.length") == 40
        bad = "[...document.querySelectorAll('#panels svg *')].filter((n) => /NaN|Infinity/.test(n.outerHTML)).length"
        assert page.run(bad) == 0
        assert page.run("document.querySelectorAll('#panels .plot:first-child .mark title').length") == 2
        assert page.run("document.querySelectorAll('#headline .alarm').length") == 1
        assert page.run("document.querySelectorAll('#alarms tbody tr').length") == 2
        # Reading values: by the keyboard, at the first and the second step.
        plot = "document.querySelector('#panels svg[role=img]')"
        for _ in range(2):
            page.run(f"{plot}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}}))")
        reward = read_run(folder).column("reward")[1]
        legend = page.run("document.querySelector('#panels .legend').textContent")
        assert f"total {reward:.3f}" in legend
        assert "at step 2" in legend
        # Another axis moves the lines.
        before = page.run("document.querySelector('#panels svg').outerHTML")
        page.run("document.getElementById('axis').value = 'rollouts'")
        page.run("document.getElementById('axis').dispatchEvent(new Event('change'))")
        assert "rollouts sampled" in page.run("document.querySelector('#panels svg[role=img]').textContent")
        assert page.run("document.querySelector('#panels svg').outerHTML") == before  # a swatch stays
        # Groups
        assert found(page)[0] == 44
        assert len(found(page)[1]) == 30
        page.run("document.getElementById('more').click()")
        assert len(found(page)[1]) == 44
        choose(page, "text", "APPLE")
        assert found(page) == (2, ["apple 40", "apple 10"])
        choose(page, "text", "answer 1 to pear")  # in a completion
        assert found(page) == (2, ["pear 40", "pear 10"])
        choose(page, "text", "")
        choose(page, "kind", "flat")
        assert found(page) == (2, ["pear 40", "pear 10"])
        choose(page, "kind", "informative")
        choose(page, "step", "10")
        choose(page, "order", "spread")
        assert found(page)[0] == 21
        assert found(page)[1][:2] == ["many 10 19", "many 10 18"]
        choose(page, "text", "apple")
        page.run("document.querySelector('.group').open = true")
        page.run("new Promise((done) => setTimeout(done, 100))")
        rows = page.run(
            "[...document.querySelectorAll('.group tr')].map((r) => [...r.cells].map((c) => c.textContent))"
        )
        assert rows[0] == ["Advantage", "Total reward", "Completion", "helpful", "harmless", "length"]
        assert [row[:4] for row in rows[1:]] == [
            ["0.433", "0.900", "answer 1 to apple 10", "0.600"],
            ["-0.0667", "0.400", "answer 2 to apple 10", "0.100"],
            ["-0.367", "0.100", "answer 0 to apple 10", "-0.200"],
        ]
        choose(page, "text", "nothing of the kind")
        assert found(page) == (0, [])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [360, 1600])
def test_the_page_fits_its_window(tmp_path, width):
    folder = fabricate(tmp_path / ("long_name_" * 12))
    write_table(folder, 40, group("word" * 200, [0.1, 0.9], ["long" * 300, "b"]))
    write_alarms(folder, alarm(20, evidence="e" * 300))
    page_file = write_report(folder, tmp_path / "out")
    with Page(width=width) as page:
        page.open(page_file)
        page.run("document.querySelectorAll('details').forEach((node) => node.open = true)")
        page.run("new Promise((done) => setTimeout(done, 300))")
        assert page.run("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_alarms_can_be_read_on_a_phone_and_heads_stay_whole(tmp_path):
    folder = fabricate(tmp_path / "run")
    write_alarms(folder, alarm(20, evidence="completions/clipped_ratio is 0.9", remedy="raise max_completion_length"))
    write_table(folder, 40, group("word", [0.1, 0.9], accuracy_of_the_answer=0.5))
    page_file = write_report(folder)
    with Page(width=390) as page:
        page.open(page_file)
        page.run("document.querySelectorAll('.group').forEach((node) => node.open = true)")
        page.run("new Promise((done) => setTimeout(done, 300))")
        assert page.run("document.documentElement.scrollWidth") <= 390
        cells = "[...document.querySelectorAll('#alarms td')].map((n) => n.getBoundingClientRect())"
        assert page.run(f"{cells}.every((box) => box.left >= 0 && box.right <= 390 && box.width > 250)")
        before = "getComputedStyle(document.querySelector('#alarms td:nth-child(4)'), '::before').content"
        assert "Evidence" in page.run(before) or "data-head" in page.run(before)
        # A word of a head is one piece.
        head = "[...document.querySelectorAll('.group th')].find((n) => n.textContent === 'accuracy_of_the_answer')"
        assert page.run(f"{head}.scrollWidth <= {head}.clientWidth")
        page.run(f"window.range = document.createRange(); range.selectNodeContents({head})")
        assert page.run("range.getClientRects().length") == 1


def test_a_page_is_small_and_complete_for_a_long_run(tmp_path):
    folder = fabricate(tmp_path / "run", steps=20_000)
    for step in range(10, 3000, 10):
        write_table(folder, step, group(f"prompt {step}", [0.1, 0.9] * 8, ["word " * 400] * 16))
    page = write_report(folder)
    assert page.stat().st_size < 12e6
    data = data_of(page)
    assert data["axes"][0]["averaged"] == 50
    assert "of 299 there are" in data["runs"][0]["groups_note"]
    steps = [group["step"] for group in data["runs"][0]["groups"]]
    assert (steps[0], steps[-1]) == (10, 2990)
    assert math.isclose(sum(step < 1500 for step in steps) / len(steps), 0.4, abs_tol=0.15)


def test_the_page_needs_no_other_file(tmp_path):
    text = render({"runs": []})
    assert "@" not in re.sub(r"@media", "", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert not re.search(r"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)
    shutil.rmtree(tmp_path)
