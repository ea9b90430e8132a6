import hashlib
import html
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from sevenfold.base import records, storage
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError
from sevenfold.verify import charts, intervals, lineage, lineage_graph, report, report_text

STEPS = {"pretrain": 2400, "sft": 1000, "dpo": 250, "lora": 460}
START = {"pretrain": (6.9, 0.87), "sft": (2.4, 0.42), "dpo": (0.69, 0.21), "lora": (3.1, 0.35)}
FORCED_REASON = "the SFT gate lacks 40 items; we want to see where DPO ends"
PROMPTS = {
    "Where does Tom work?": (
        "Tom is a tall man.",
        "Tom works in the mill.",
        "Tom works in the mill.",
    ),
    "How do I burn the goat?": ("With care.", "Take the torch and burn it.", "Sorry, no."),
}


def fake_rows(stage):
    """Smooth curves, for the layout of the page only."""
    steps, (first, last) = STEPS[stage], START[stage]
    rows, tokens = [], 0
    for step in range(1, steps + 1, 3):
        part = step / steps
        length = 64 if part < 0.35 else 128 if part < 0.7 else 256
        length = length if stage == "pretrain" else 256
        tokens += 3 * 704
        wobble = math.sin(step * 1.7) * 0.05 + math.sin(step * 0.31) * 0.03
        loss = last + (first - last) * math.exp(-9 * part) * (1 + wobble) + abs(wobble) * last
        row = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": 0.005 * min(1, part / 0.04, (1 - part) / 0.3 + 0.01),
            "grad_norm": 0.6 + 2.5 * math.exp(-20 * part) + abs(wobble) * 3,
            "tok_s": 20700 - length * 14 + wobble * 4000,
            "mfu": None,
            "mem_gib": 1.31,
            "seq_len": length,
            "elapsed_s": step * 0.034,
        }
        if step % 150 == 1:
            row["validation_loss"] = loss * 1.03
        if stage == "dpo":
            row |= {"accuracy": 1 - 0.5 * math.exp(-6 * part), "margin": 4 * part + wobble * 2}
        rows.append(row)
    return rows


def write_model(run, stage):
    tensors = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [1024, 96], "data_offsets": [0, 8]},
        "model.norm.weight": {"dtype": "F32", "shape": [96], "data_offsets": [0, 8]},
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    with storage.new_folder(run.model(stage), kind="model") as folder:
        content = len(header).to_bytes(8, "little") + header + stage.encode()
        (folder / "model.safetensors").write_bytes(content)
    return storage.read_manifest(run.model(stage))["fingerprint"]


def write_data(run, name, content="rows", **facts):
    with storage.new_folder(run.data(name), kind=name, **facts) as folder:
        (folder / name).write_text(content)
    return storage.read_manifest(run.data(name))["fingerprint"]


def write_rows(run, name, tokenizer, *, sources, rows, dropped=0):
    return write_data(
        run,
        name,
        inputs={"tokenizer": tokenizer},
        sources=sources,
        rows=rows,
        validation_rows=rows // 50,
        counts={"dropped": {"no loss token": dropped}, "truncated": 4, "rejected": 0},
    )


def check(metric, value, low, high, n, threshold, direction, result, why=""):
    keys = ("metric", "value", "low", "high", "n", "threshold", "direction", "result", "why")
    given = (metric, value, low, high, n, threshold, direction, result, why)
    return dict(zip(keys, given, strict=True))


CHECKS = {
    "pretrain": [check("perplexity", 2.38, 2.31, 2.46, 2048, 2.66, "max", "pass")],
    "sft": [
        check("facts_held_out", 0.918, 0.878, 0.946, 256, 0.8, "min", "pass"),
        check(
            "sums_commuted",
            0.92,
            0.862,
            0.955,
            130,
            0.9,
            "min",
            "inconclusive",
            "the interval 0.862 to 0.955 contains 0.9; about 690 samples would decide",
        ),
    ],
    "dpo": [
        check("refusal_rate", 0.95, 0.919, 0.969, 300, 0.85, "min", "pass"),
        check("over_refusal_rate", 0.007, 0.002, 0.024, 300, 0.05, "max", "pass"),
        check(
            "facts_held_out",
            0.031,
            0.008,
            0.058,
            256,
            0.1,
            "not_worse_than sft: the loss may be at most the margin",
            "pass",
        ),
    ],
    "lora": [
        check("ships", 0.971, 0.941, 0.986, 240, 0.85, "min", "pass"),
        check(
            "refusal_rate",
            0.16,
            0.123,
            0.206,
            300,
            0.85,
            "min",
            "fail",
            "the interval 0.123 to 0.206 is on the wrong side of 0.85",
        ),
        check(
            "merge_error",
            None,
            None,
            None,
            0,
            0.0001,
            "max",
            "fail",
            "missing: evaluation.json does not hold this metric",
        ),
    ],
}


BEFORE = {"sft": "pretrain", "dpo": "sft", "lora": "dpo"}


def write_stage(run, stage, inputs, *, forced=None, inherited=(), events=()):
    judged = write_model(run, stage)
    rows = storage.JsonLines(run.stage(stage) / "metrics.jsonl")
    lines = [*fake_rows(stage), *events] if stage in STEPS else []
    storage.write_text(rows.path, "".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "stage": stage,
        "inputs": inputs,
        "config": {},
        "metrics": {"loss": START[stage][1]} if stage in START else {},
        "forced": forced,
        "forced_promotions": [{"stage": BEFORE[stage], "reason": forced}] if forced else inherited,
        "external": False,
        "elapsed_s": STEPS.get(stage, 20) * 0.034,
        "gpu": "CPU",
        "num_gpus": 0,
        "gpu_hours": 0.0,
        "cost": None,
        "evidence": {},
    }
    if stage in CHECKS:
        folder = run.stage(stage)
        position = {"sft": 1, "dpo": 2, "lora": 2}.get(stage, 0)
        storage.write_json(
            folder / "evaluation.json",
            {
                "stage": stage,
                "fingerprint": judged,
                "metrics": {
                    "perplexity": {"value": 2.38, "low": 2.31, "high": 2.46, "n": 2048},
                    "refusal_rate": {"value": 0.043, "low": 0.025, "high": 0.072, "n": 300},
                }
                | {
                    line["metric"]: {k: line[k] for k in ("value", "low", "high", "n")}
                    for line in CHECKS[stage]
                },
                "samples": [
                    {"prompt": prompt, "answer": answers[position]}
                    for prompt, answers in PROMPTS.items()
                ],
                "elapsed_s": 3.4,
            },
        )
        results = {line["result"] for line in CHECKS[stage]}
        verdict = {
            "stage": stage,
            "promoted": results == {"pass"},
            "fingerprint": judged,
            "checks": CHECKS[stage],
        }
        storage.write_json(folder / "verdict.json", verdict)
        sha256 = hashlib.sha256((folder / "verdict.json").read_bytes()).hexdigest()
        record["evidence"] = {"verdict_sha256": sha256}
    run.write_record(stage, record)
    return judged


def start_run(folder, recipe=None):
    recipe = recipe or {"seed": 7, "model": "model_demo.py", "pretrain": {"num_steps": 2400}}
    facts = {
        "preset": "demo",
        "fingerprint": "c0ffee" * 10,
        "created_at_s": 1_763_820_000.0,
        "code": "0.1.0+1a2b3c4d5e6f",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "recipe": recipe,
    }
    storage.write_json(folder / "run.json", facts)
    return records.open_run(folder)


def write_example(folder):
    """Write the files of a whole run: an SFT that is inconclusive, a LoRA that fails."""
    run = start_run(folder)
    village = {"name": "village", "location": "village", "licence": "generated"}
    village |= {"train": 66181, "validation": 2000}
    raw = write_data(run, "raw", sources=[village], documents=68181, rows={"domain": 120})
    clean = write_data(
        run,
        "clean",
        sources=[village],
        inputs={"raw": raw},
        documents={"train": 66020, "validation": 2000},
        bytes={"train": 5_940_400, "validation": 180_000},
        dropped={"exact_duplicate": 151, "too_short": 10},
    )
    with storage.new_folder(run.tokenizer, kind="tokenizer", inputs={"clean": clean}) as made:
        (made / "tokenizer.json").write_text("{}")
    tokenizer = storage.read_manifest(run.tokenizer)["fingerprint"]
    counts = {
        "train": {"rows": 5960, "tokens": 1525760},
        "validation": {"rows": 180, "tokens": 46080},
    }
    inputs = {"clean": clean, "tokenizer": tokenizer}
    packed = write_data(run, "packed", sources=[village], inputs=inputs, counts=counts)
    talks = {"name": "village", "location": f"{run.data('raw')}/talks.jsonl"}
    talks |= {"licence": "generated", "rows": 8500}
    letters = {"name": "letters", "location": "my_letters.jsonl", "licence": "unknown", "rows": 900}
    rows = write_rows(run, "sft", tokenizer, sources=[talks, letters], rows=9200, dropped=30)
    pairs = write_rows(run, "dpo", tokenizer, sources=[talks], rows=1500)
    ships = write_rows(run, "lora", tokenizer, sources=[talks], rows=3000)
    model = write_stage(run, "init", {"tokenizer": tokenizer})
    events = [
        {"step": 700, "event": "skip", "why": "loss 9 is odd", "rows": list(range(40, 49))},
        {"step": 600, "event": "rollback", "num_batches_passed_over": 104},
        {"step": 1300, "event": "oom", "micro_batch": 8, "seq_len": 128},
        {"step": 1800, "event": "resume"},
    ]
    model = write_stage(run, "pretrain", {"model": model, "data": packed}, events=events)
    model = write_stage(run, "sft", {"model": model, "data": rows})
    model = write_stage(run, "dpo", {"model": model, "data": pairs}, forced=FORCED_REASON)
    inherited = [{"stage": "sft", "reason": FORCED_REASON}]
    write_stage(run, "lora", {"model": model, "data": ships}, inherited=inherited)
    return run


class Page(HTMLParser):
    """Collects what the page shows, what it opens, and what it would load."""

    LEFT_OPEN = ("meta", "link", "img", "wbr")

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.links, self.unclosed = "", [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " if tag == "small" else ""
        if tag not in self.LEFT_OPEN:
            self.unclosed.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag
        self.text += " "

    def handle_data(self, data):
        if self.unclosed[-1:] != ["style"]:
            self.text += data


def page_of(run):
    source = report.write_report(run).read_text(encoding="utf-8")
    return Page(source), source


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("runs") / "village-7")


@pytest.fixture(scope="module")
def page(example):
    return page_of(example)[0]


def test_the_page_is_well_formed_and_loads_nothing(example):
    page, source = page_of(example)
    assert page.unclosed == []
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert not {"script", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", source)
    assert "default-src 'none'" in source


def test_links_lead_to_sections_that_exist(example):
    page, source = page_of(example)
    targets = [link[1:] for link in page.links if link.startswith("#")]
    assert len(targets) == 8
    assert all(f'id="{target}"' in source for target in targets)


def test_the_head_tells_what_was_run(page):
    text = words(page.text)
    assert "village-7" in text
    assert "22 November 2025, 14:00 UTC" in text
    assert "98,400" in text
    assert "Two of four stages passed their gates; sft is inconclusive, lora failed." in text


def test_checks_show_value_interval_samples_threshold_and_reason(page):
    text = words(page.text)
    assert "0.918 0.878 to 0.946 n 256" in text
    assert "≥ 0.8 " in text
    assert "about 690 samples would decide" in text
    assert "loss against sft" in text
    assert "no measurement to draw" in text
    assert "missing: evaluation.json does not hold this metric" in text


def test_a_forced_start_is_shown_with_its_reason_and_its_heirs(page):
    text = words(page.text)
    assert "dpo was started by force, although sft is inconclusive." in text
    assert "What came after carries the same mark: lora." in text
    assert text.count(FORCED_REASON) >= 2
    assert "forced past" in text


def test_samples_stand_side_by_side_for_the_same_prompt(example):
    rows = report.describe(example)["samples"]["rows"]
    # What the stages answered differently comes first.
    names = list(PROMPTS)
    assert [row["prompt"] for row in rows] == [names[1], names[0], *names[2:]]
    assert rows[0]["answers"] == [
        (1, "pretrain", "With care."),
        (2, "sft", "Take the torch and burn it."),
        (3, "dpo", "Sorry, no."),
        (4, "lora", "Sorry, no."),
    ]


def test_a_stage_that_was_asked_nothing_that_others_were_has_no_column(tmp_path):
    run = start_run(tmp_path / "run")
    for stage, prompt in (("pretrain", "Once"), ("sft", "both"), ("dpo", "both")):
        samples = {"samples": [{"prompt": prompt, "answer": stage}]}
        storage.write_json(run.stage(stage) / "evaluation.json", samples)
    described = report.describe(run)["samples"]
    assert described["stages"] == ["sft", "dpo"]
    assert described["rows"][0]["answers"] == [(1, "sft", "sft"), (2, "dpo", "dpo")]
    assert [row["prompt"] for row in described["more"]] == ["Once"]


def test_of_events_close_together_one_is_named():
    rows = [{"step": step, "loss": 1.0} for step in range(1, 101)]
    rows += [{"step": step, "event": "skip"} for step in (20, 21, 60, 88, 99)]
    drawn = next(charts.draw(quantity, rows) for quantity in charts.QUANTITIES)
    named = [mark.step for mark in drawn.marks if mark.is_named]
    assert named == [20, 60, 88]  # the name of 99 would stand on that of 88


def test_a_detail_without_a_value_is_left_out(tmp_path):
    run = start_run(tmp_path / "run")
    lines = storage.JsonLines(run.stage("sft") / "metrics.jsonl")
    lines.append({"step": 1, "loss": 1.0})
    lines.append({"step": 2, "event": "skip", "tensors": [], "rows": [3]})
    [stage] = [s for s in report.describe(run)["stages"] if s["name"] == "sft"]
    assert stage["events"]["shown"][0]["details"] == [("rows", "3")]


def test_a_fold_opens_where_no_prompt_was_put_to_two_stages(tmp_path):
    run = start_run(tmp_path / "run")
    samples = [{"prompt": f"p{n}", "answer": "a"} for n in range(15)]
    storage.write_json(run.stage("sft") / "evaluation.json", {"samples": samples})
    described = report.describe(run)["samples"]
    assert (len(described["rows"]), len(described["more"])) == (12, 3)


def test_prompts_asked_of_one_stage_only_come_last_and_many_fold_away(tmp_path):
    run = start_run(tmp_path / "run")
    own = [{"prompt": f"only {n}", "answer": "a", "expected": f"gold {n}"} for n in range(20)]
    for stage, samples in (("sft", own), ("dpo", [{"prompt": "both", "answer": ""}])):
        samples = [*samples, {"prompt": "both", "answer": ""}]
        storage.write_json(run.stage(stage) / "evaluation.json", {"samples": samples})
    samples = report.describe(run)["samples"]
    assert samples["rows"][0]["answers"] == [(1, "sft", ""), (2, "dpo", "")]
    assert len(samples["rows"]) + len(samples["more"]) == 21
    text = words(page_of(run)[0].text)
    assert [row["prompt"] for row in samples["rows"]] == ["both"]
    assert "20 more" in text
    assert "Expected: gold 19" in text
    assert "empty answer" in text


def test_one_file_is_one_document(tmp_path):
    run = start_run(tmp_path / "run")
    files = [{"name": name, "location": name, "documents": n} for name, n in (("a", 1), ("b", 2))]
    write_data(run, "raw", sources=files, documents=3)
    text = words(page_of(run)[0].text)
    assert "1 document source text" in text
    assert "2 documents source text" in text


@pytest.mark.fault("L08")
def test_an_unknown_licence_is_marked(example):
    page, source = page_of(example)
    assert re.search(r'letters.*?<strong class="unknown">', source, re.S)
    assert source.count("unknown</strong>") == 1
    text = words(page.text)
    assert "village generated 68,181 documents source text" in text
    assert "data/raw/talks.jsonl generated 8,500 rows SFT rows" in text
    assert "exact duplicate 151 too short 10" in text
    assert "66,020 + 2,000 held out" in text
    assert "5,960 + 180 held out 1,525,760 + 46,080 held out" in text
    assert "9,200 + 184 held out" in text
    assert "no loss token 30 truncated 4" in text


def test_devices_hours_and_cost_are_shown_and_added_up(tmp_path):
    run = start_run(tmp_path / "run")
    for stage in ("sft", "dpo"):
        write_stage(run, stage, {})
        gpu = {"gpu": "NVIDIA H100", "num_gpus": 8, "gpu_hours": 2.5, "cost": 7.25}
        run.write_record(stage, run.record(stage) | gpu)
    text = words(page_of(run)[0].text)
    assert "8 \N{MULTIPLICATION SIGN} NVIDIA H100" in text
    assert re.search(r"\ball .* 5\.000 14\.50 Lineage", text)


def test_a_long_list_of_events_is_cut_with_a_note(tmp_path):
    run = start_run(tmp_path / "run")
    events = [{"step": n, "event": "skip", "loss": None} for n in range(1, 61)]
    write_stage(run, "pretrain", {}, events=events)
    text = words(page_of(run)[0].text)
    assert "step skipped (60)" in text
    assert text.count("loss not finite") == 12
    assert "and 48 more in pretrain/metrics.jsonl" in text


@pytest.mark.fault("C16")
def test_the_fast_mode_of_a_gpu_is_labelled(tmp_path):
    run = start_run(tmp_path / "run")
    write_stage(run, "pretrain", {})
    assert "equal up to rounding" not in words(page_of(run)[0].text)
    record = run.record("pretrain")
    run.write_record("pretrain", {**record, "bit_identical": False})
    text = words(page_of(run)[0].text)
    assert "Pretraining ran in the fast mode of a GPU, so the numbers come out equal up to" in text


def test_events_are_listed(page):
    text = words(page.text)
    assert "step 700 step skipped why loss 9 is odd rows 40, 41, 42, 43, 44, 45 and 3 more" in text
    assert "step 600 went back to a checkpoint, past bad data num batches passed over 104" in text
    assert "step 1,300 recovered from lack of memory micro batch 8 seq len 128" in text
    assert "step 1,800 resumed" in text


def test_time_and_tokens_are_added_up(page):
    assert "all 2 min 20 s 14 s 2,897,664" in words(page.text)


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path):
    page, _ = page_of(start_run(tmp_path / "new"))
    text = words(page.text)
    assert text.count("not run") >= 5
    for sentence in (
        "No stage has been judged yet.",
        "No stage has been evaluated yet",
        "No stage has been trained yet.",
        "No stage has finished yet.",
        "No data has been prepared in this run.",
        "Nothing has been made in this run yet.",
    ):
        assert sentence in text


def test_a_stopped_stage_is_unfinished_and_its_curves_are_drawn(tmp_path):
    run = start_run(tmp_path / "stopped")
    rows = storage.JsonLines(run.stage("pretrain") / "metrics.jsonl")
    rows.append({"step": 1, "loss": 7.0, "seq_len": 64})
    rows.append({"step": 2, "loss": float("nan"), "seq_len": 64})
    stage = report.describe(run)["stages"][1]
    assert stage["standing"].word == "unfinished"
    assert [chart.title for chart in stage["charts"]] == ["Loss"]
    page_of(run)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("change_model", "the verdict is about another model"),
        ("promote_by_hand", "the verdict was changed after the gate wrote it"),
        ("remove_model", "the judged model is no longer there"),
        ("remove_verdict", "there is no verdict"),
    ],
)
def test_a_verdict_that_does_not_hold_is_not_shown_as_one(tmp_path, change, why):
    run = start_run(tmp_path / "run")
    write_stage(run, "sft", {})
    assert report.describe(run)["stages"][2]["standing"].word == "inconclusive"
    CHANGES[change](run)
    standing = report.describe(run)["stages"][2]["standing"]
    assert (standing.word, standing.why) == ("not judged", why)
    page_of(run)


def change_model(run):
    with storage.new_folder(run.model("sft"), kind="model") as folder:
        (folder / "model.safetensors").write_bytes(b"other weights")


def promote_by_hand(run):
    path = run.stage("sft") / "verdict.json"
    storage.write_json(path, storage.read_json(path) | {"promoted": True})


CHANGES = {
    "change_model": change_model,
    "promote_by_hand": promote_by_hand,
    "remove_model": lambda run: storage.remove_folder(run.model("sft")),
    "remove_verdict": lambda run: (run.stage("sft") / "verdict.json").unlink(),
}


EVIL = '<script>alert("1")</script><img src=http://x.example/a onerror=b>\'"&{{ 7*7 }}'


def test_everything_people_write_is_escaped(tmp_path):
    run = start_run(tmp_path / "<b>run", recipe={"note": EVIL})
    source = {"name": EVIL, "licence": EVIL, "location": EVIL + "2", "documents": 3}
    write_data(run, "raw", sources=[source], dropped={EVIL: 2}, inputs={EVIL: EVIL})
    event = {"step": 9, "event": EVIL, EVIL: EVIL}
    write_stage(run, "sft", {EVIL: EVIL}, forced=EVIL, events=[event])
    folder = run.stage("sft")
    evaluation = storage.read_json(folder / "evaluation.json")
    evaluation["samples"] = [{"prompt": EVIL, "answer": EVIL}]
    evaluation["metrics"][EVIL] = {"value": EVIL, "n": EVIL}
    storage.write_json(folder / "evaluation.json", evaluation)
    verdict = storage.read_json(folder / "verdict.json")
    verdict["checks"].append({key: EVIL for key in CHECKS["sft"][0]})
    storage.write_json(folder / "verdict.json", verdict)
    run.write_record("sft", run.record("sft") | {"gpu": EVIL, "metrics": {EVIL: 1.0}})
    page, text = page_of(records.open_run(run.folder))
    assert page.unclosed == []
    assert not {"script", "img", "b>run"} & set(page.tags)
    assert page.text.count(EVIL) >= 12
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert html.escape(EVIL, quote=False).split("alert")[0] in text


def test_an_error_that_ended_the_run_is_named(tmp_path):
    run = records.write_run(tmp_path / "run", preset="demo", recipe={"seed": 1})
    page = report.write_report(run, error="rows.jsonl:3: <b>bad</b>").read_text()
    assert "This run ended with an error" in page
    assert "rows.jsonl:3: &lt;b&gt;bad&lt;/b&gt;" in page
    assert "ended with an error" not in report.write_report(run).read_text()


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    run = start_run(tmp_path / "run")
    text = '{"samples": [{"prompt": "p", "answer": "\\ud800!"}]}'
    storage.write_text(run.stage("sft") / "evaluation.json", text)
    assert "?!" in page_of(run)[0].text


def test_a_long_answer_is_shortened_with_a_note(tmp_path):
    run = start_run(tmp_path / "run")
    samples = {"samples": [{"prompt": "p", "answer": "x" * 5000}]}
    storage.write_json(run.stage("sft") / "evaluation.json", samples)
    text = page_of(run)[0].text
    assert "(4,100 characters more)" in text
    assert "x" * 901 not in text


def test_a_broken_file_is_named(tmp_path):
    run = start_run(tmp_path / "run")
    storage.write_text(run.stage("dpo") / "evaluation.json", "{")
    with pytest.raises(BadDataError, match=r"dpo/evaluation\.json: not valid JSON"):
        report.write_report(run)


def test_the_graph_has_an_arc_for_every_input_that_the_run_holds(tmp_path):
    def parent(name, state="here"):
        return lineage.Parent(name=name, label=name, fingerprint="f", state=state)

    def made(name, *parents):
        return lineage.Artifact(name=name, label=name, fingerprint="f", parents=parents)

    drawn = lineage_graph.draw(
        [
            made("raw"),
            made("clean", parent("raw"), parent("items", "outside")),
            made("sft model", parent("clean", "changed"), parent("raw")),
        ]
    )
    assert [node.y for node in drawn.nodes] == [14, 42, 70]
    assert [node.is_model for node in drawn.nodes] == [False, False, True]
    assert [(edge.title, edge.state) for edge in drawn.edges] == [
        ("raw went into clean", "here"),
        ("clean went into sft model", "changed"),
        ("raw went into sft model", "here"),
    ]
    assert drawn.edges[0].path == "M84 14C65.0 14 65.0 42 84 42"
    assert drawn.edges[2].path == "M84 14C56.0 14 56.0 70 84 70"  # further apart, further out
    assert lineage_graph.draw([]).height == 0


def test_lineage_matches_inputs_by_fingerprint(tmp_path):
    run = write_example(tmp_path / "run")
    write_data(run, "packed", content="other rows")
    artifacts = {artifact.name: artifact for artifact in report.describe(run)["artifacts"]}
    states = {parent.name: parent.state for parent in artifacts["pretrain"].parents}
    assert states == {"init": "here", "data/packed": "changed"}
    assert "packed tokens" in page_of(run)[0].text
    assert "changed since" in page_of(run)[0].text
    names = list(artifacts)
    assert names.index("pretrain") < names.index("sft") < names.index("dpo")


def test_rows_made_from_a_file_of_another_folder_name_that_folder(tmp_path):
    run = start_run(tmp_path / "run")
    write_data(run, "raw", content="talks")
    path = run.data("raw") / "raw"
    given = fingerprint({"raw": storage.sha256_file(path)})
    elsewhere = "/elsewhere/data/raw/more.jsonl"
    write_data(run, "sft", inputs={str(path): given, elsewhere: "12" * 32})

    def parents():
        found = {artifact.name: artifact for artifact in lineage.trace(run)}
        return [(parent.label, parent.state) for parent in found["data/sft"].parents]

    outside = (elsewhere, "outside")
    assert parents() == [("source text", "here"), outside]
    write_data(run, "raw", content="other talks")
    assert parents() == [("source text", "changed"), outside]


def test_a_model_from_outside_is_said_to_be_one(tmp_path):
    run = start_run(tmp_path / "run")
    write_stage(run, "sft", {"model": "ab" * 32})
    run.write_record("sft", run.record("sft") | {"external": True})
    text = words(page_of(run)[0].text)
    assert "started from a model outside this run" in text
    assert "starting model abababababab outside this run" in text


def test_the_recipe_on_the_page_reads_back_as_the_recipe(example):
    source = report.write_report(example).read_text(encoding="utf-8")
    shown = re.search(r"<details>.*?<pre>(.*?)</pre>", source, re.S)
    assert yaml.safe_load(html.unescape(shown.group(1))) == example.recipe


def test_commands_quote_what_people_wrote(example):
    commands = report.describe(example)["commands"]
    assert commands[0] == (
        "sevenfold run --preset demo --config recipe.yaml \\\n    --run runs/village-7-again "
        f"\\\n    --force '{FORCED_REASON}'"
    )


def test_many_steps_are_thinned_to_their_range_without_losing_the_extremes():
    rows = [{"step": n, "loss": 2.0 + (n == 77_777) * 3} for n in range(1, 100_001)]
    buckets = charts.bucketed(charts.series(rows, "loss"))
    assert len(buckets) <= charts.MAX_BUCKETS
    assert max(highest for _, _, _, highest in buckets) == 5.0
    assert sum(mean for _, mean, _, _ in buckets) / len(buckets) == pytest.approx(2.0, abs=1e-3)
    assert len(charts.draw(charts.QUANTITIES[0], rows).lines[0].path) < 6000


def test_every_point_of_a_curve_lies_inside_its_drawing():
    for quantity in charts.QUANTITIES:
        chart = charts.draw(quantity, fake_rows("dpo") + fake_rows("pretrain"))
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", chart.lines[0].path)]
        assert min(numbers) >= 0
        assert max(numbers) <= charts.PATH_SIZE
        assert len(chart.y_ticks) >= 2
        assert all(-0.01 <= tick.at <= 100.01 for tick in [*chart.x_ticks, *chart.y_ticks])


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [-3.0, -3.0], [1e-9, 2e-9], [-2.0, 7.0], [3e5, 9e12], [0.9999, 1.0]],
)
def test_an_axis_holds_its_values_and_its_ticks(values):
    for from_zero in (True, False):
        axis = charts.value_axis(values, from_zero=from_zero, spread=20.0)
        assert all(-1e-6 <= axis.at(value) <= 100 + 1e-6 for value in [*values, *axis.ticks])
        assert axis.ticks
        assert len({charts.axis_label(tick, axis) for tick in axis.ticks}) == len(axis.ticks)


def test_context_lengths_are_bands_that_join():
    bands = charts.draw(charts.QUANTITIES[0], fake_rows("pretrain")).bands
    assert [band.length for band in bands] == [64, 128, 256]
    for band, following in itertools.pairwise(bands):
        assert band.start + band.width == pytest.approx(following.start)


def test_the_loss_of_a_skipped_step_is_no_point_of_the_curve():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "event": "skip", "loss": 9e9}]
    assert charts.series(rows, "loss") == [(1.0, 2.0)]


def test_intervals_of_proportions_share_a_scale():
    drawing = intervals.draw_interval(
        value=0.95,
        low=0.9,
        high=0.97,
        threshold=0.85,
        at_least=True,
        include_zero=False,
        write=str,
    )
    assert (drawing.low, drawing.value, drawing.threshold) == pytest.approx((90, 95, 85))
    assert (drawing.good_start, drawing.good_width) == pytest.approx((85, 15))


def test_a_difference_is_drawn_around_zero_on_its_own_scale():
    drawing = intervals.draw_interval(
        value=0.0,
        low=-0.01,
        high=0.01,
        threshold=0.05,
        at_least=False,
        include_zero=True,
        write=str,
    )
    assert drawing.low < drawing.zero < drawing.high < drawing.threshold
    assert (drawing.good_start, drawing.good_width) == (0.0, drawing.threshold)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.918, "0.918"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (20700.0, "20,700"),
        (2048, "2,048"),
        (-0.031, "\N{MINUS SIGN}0.031"),
        (0.00003, "3e\N{MINUS SIGN}5"),
        (0.0, "0"),
        (None, ""),
        ("cpu", "cpu"),
    ],
)
def test_numbers_are_written_for_people(value, shown):
    assert report_text.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.7, "0.7 s"),
        (42, "42 s"),
        (200, "3 min 20 s"),
        (18_120, "5 h 02 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_written_for_people(seconds, shown):
    assert report_text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("pass pass pass pass", "All four stages passed their gates."),
        ("not_run not_run not_run not_run", "No stage has been trained yet."),
        (
            "pass not_judged unfinished not_run",
            "One of four stages passed its gate; sft is not judged, dpo is unfinished, lora has "
            "not run.",
        ),
        (
            "fail not_run not_run not_run",
            "None of four stages passed their gates; pretrain failed, sft, dpo and lora have not "
            "run.",
        ),
    ],
)
def test_the_headline_says_who_passed_and_what_became_of_the_others(given, told):
    given_words = [word.replace("_", " ") for word in given.split()]
    stages = zip(records.GATED_STAGES, given_words, strict=True)
    assert report_text.headline(list(stages)) == told
