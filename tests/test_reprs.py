"""How results are shown in notebooks and terminals: complete, escaped, small, and of any content."""

import copy
import dataclasses
import math
import subprocess
import sys
from html.parser import HTMLParser

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from record_case import problem, record
from view_case import synthetic_analysis

import ntkscope
from ntkscope._display import Displayed
from ntkscope.gate.audit_results import FIGURES
from ntkscope.spectrum.examples import Examples
from ntkscope.view import brief, findings, meanings, notebook, sentences, sparkline
from ntkscope.view.pictures import picture_uri

HOSTILE = '" onload=alert(0) x="</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m{{ 7*7 }} " \' http://example.org'
LARGEST = 100_000  # characters
VOID = {"br", "img"}
# Public classes that are no results: options, accumulators, errors.
NOT_SHOWN = {"AuditOptions", "MicrobatchVariance", "StreamingMoments"}
SHOWN = sorted(
    name
    for name in ntkscope.__all__
    if isinstance(kind := getattr(ntkscope, name), type) and not issubclass(kind, Exception) and name not in NOT_SHOWN
)


class _Balance(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_html(shown):
    """Parse a table; it must be small, balanced, and load and run nothing."""
    assert len(shown) < LARGEST
    parsed = _Balance()
    parsed.feed(shown)
    parsed.close()
    assert not parsed.open
    names = {tag for tag, _ in parsed.tags}
    assert names <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "b", "br", "details", "summary", "svg", "path", "img"}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        assert "href" not in attributes
    return parsed


def check_line(line):
    assert len(line) <= 400
    assert "\n" not in line
    assert "tensor(" not in line


def parts_of(value, found):
    """Collect every shown object inside a result, by class."""
    if isinstance(value, Displayed):
        found.setdefault(type(value).__name__, value)
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            parts_of(getattr(value, field.name), found)
    elif isinstance(value, dict):
        for each in value.values():
            parts_of(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            parts_of(each, found)
    return found


@pytest.fixture(scope="module")
def results():
    """Objects of every class, real ones."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(8, (4,), generator=generator) for _ in range(60)]
    recorder = record(
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        steps=60,
        query=True,
        audit=True,
        every_step=True,
        steps_per_epoch=2,
        batches=batches,
    )
    found = parts_of(ntkscope.analyze(recorder, window=(0, 60), jackknife=4, audit=ntkscope.AuditOptions(num_permutations=10)), {})
    sgd = record(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), steps=20)
    parts_of(ntkscope.jump_study(sgd), found)
    model, inputs, targets = problem()
    price, coverage = ntkscope.price_gram(model, inputs)
    operator = ntkscope.NTKOperator(model, inputs)
    moments = ntkscope.gradient_moments(model, inputs, targets, loss="cross_entropy")
    optimizer = ntkscope.GatedAdamW([{"params": [p], "gate": "soft"} for p in model.parameters()], gate_stats=True)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    streaming = ntkscope.streaming_variance(optimizer, model)
    compared = ntkscope.compare_variances(streaming, ntkscope.exact_variance(moments), moments.mean, alpha=1.0)
    others = [
        recorder, recorder.trace, recorder.trace[1], price, coverage, ntkscope.ntk_gram(model, inputs, by_layer=True), operator,
        operator.top(2), moments, optimizer, optimizer.gate_statistics(), ntkscope.population_risk(moments), compared,
        ntkscope.price_audit(recorder), ntkscope.analyze(dataclasses.replace(sgd.trace, is_from_checkpoints=True)).density,
    ]  # fmt: skip
    for each in others:
        parts_of(each, found)
    return found


@pytest.mark.parametrize("name", SHOWN)
def test_every_public_result_is_shown(results, name):
    result = results[name]
    parsed = check_html(result._repr_html_())
    text = " ".join(parsed.text)
    assert name in text
    assert meanings.summary_of(type(result)) in text or name == "Analysis"
    check_line(repr(result).replace("\n", " ")[:400] if name == "GatedAdamW" else repr(result))
    assert repr(result).startswith(name)


def test_no_public_class_was_forgotten():
    kinds = {name: getattr(ntkscope, name) for name in SHOWN}
    assert not [name for name, kind in kinds.items() if not issubclass(kind, Displayed)]
    assert {"Analysis", "Closure", "Recorder", "NTKOperator", "GatedAdamW"} <= set(kinds)


def shown_kinds():
    """All classes that derive from `Displayed`."""
    found, queue = set(), [Displayed]
    while queue:
        kinds = queue.pop().__subclasses__()
        found.update(kind for kind in kinds if kind.__module__.startswith("ntkscope"))
        queue.extend(kinds)
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", shown_kinds(), ids=lambda kind: kind.__name__)
def test_every_field_has_a_meaning(kind):
    found = meanings.meanings_of(kind)
    assert meanings.summary_of(kind)
    if dataclasses.is_dataclass(kind):
        assert set(found) == {field.name for field in dataclasses.fields(kind)}
    assert all(len(meaning) > 1 for meaning in found.values())


def test_a_meaning_goes_on_over_lines():
    assert meanings.meanings_of(ntkscope.Closure)["causes"].endswith("because a run that converged closes with any scale.")
    assert meanings.meanings_of(ntkscope.GatedAdamW, "Args")["lr"].startswith("Learning rate")


def test_tables_by_class_name_are_of_classes_that_exist():
    names = {kind.__name__ for kind in shown_kinds()}
    for table in (sentences.SENTENCES, notebook.DESCRIBED, brief.LEADING):
        assert set(table) <= names


def spoiled(value, *, text=None, number=None):
    """Replace every text, or every number, in a result; checks of types are passed by, as a damaged file might."""
    if isinstance(value, str):
        return value if text is None else text
    if isinstance(value, float):
        return value if number is None else number
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, number) if number is not None and value.is_floating_point() else value
    if isinstance(value, dict):
        return {spoiled(key, text=text) if isinstance(key, str) else key: spoiled(v, text=text, number=number) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(spoiled(each, text=text, number=number) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, spoiled(getattr(value, field.name), text=text, number=number))
        return made
    return value


def is_keyed(name):
    """Say whether a class needs certain keys in its dictionaries, so that these cannot be hostile."""
    return name in {"Analysis", "Cells", "GateAudit", "GateStats", "Sensitivity", "StepAudit", "Transfer"}


@pytest.mark.parametrize("name", SHOWN)
def test_hostile_text_is_escaped(results, name):
    if is_keyed(name) or not dataclasses.is_dataclass(results[name]):
        pytest.skip("its texts are keys, or its own; see the other tests of hostile text")
    parsed = check_html(spoiled(results[name], text=HOSTILE)._repr_html_())
    assert "script" not in {tag for tag, _ in parsed.tags}
    check_line(repr(spoiled(results[name], text=HOSTILE)))


def test_hostile_text_is_escaped_where_keys_matter(results):
    examples = dataclasses.replace(results["Examples"])
    object.__setattr__(examples, "ids", [HOSTILE] * 8)
    object.__setattr__(examples, "labels", [HOSTILE] * 8)
    object.__setattr__(examples, "abstains", HOSTILE)
    object.__setattr__(examples, "pictures", torch.zeros(8, 8, 8, 3, dtype=torch.uint8))
    check_html(examples._repr_html_())
    audit = results["GateAudit"]
    bad = copy.copy(audit)
    object.__setattr__(bad, "overall", {HOSTILE: audit.overall["recall"]})
    object.__setattr__(bad, "layers", {HOSTILE: next(iter(audit.layers.values()))})
    object.__setattr__(bad, "warnings", (HOSTILE,))
    check_html(bad._repr_html_())
    analysis = synthetic_analysis(source=HOSTILE, has_gate=True, is_trustworthy=False)
    analysis.closure.causes = analysis.warnings = (HOSTILE,)
    analysis.channels.rule = HOSTILE
    analysis.examples.ids = [HOSTILE] * 30
    check_html(notebook.analysis_html(analysis))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@pytest.mark.parametrize("name", SHOWN)
def test_any_number_is_shown(results, name, number):
    result = spoiled(results[name], number=number)
    parsed = check_html(result._repr_html_())
    assert "nan" not in " ".join(parsed.text).lower().replace("; nan", "").replace(" nan ", " ").split()
    assert repr(result)


def test_the_first_screen_of_an_analysis(results):
    analysis = results["Analysis"]
    parsed = check_html(analysis._repr_html_())
    before, _, parts = " ".join(parsed.text).partition("All parts")
    assert findings.headline(analysis) in before
    assert findings.verdict(analysis.closure).short in before
    assert "analysis.report(" in before
    assert "analysis.plot.spectrum()" in before
    for warning in analysis.warnings:
        assert warning in before or warning.startswith("Not trustworthy")
    assert meanings.meanings_of(type(analysis))["channels"] in parts


@pytest.mark.parametrize(
    "options", [{}, {"has_gate": True}, {"has_nan": True, "is_trustworthy": False}, {"has_labels": False, "has_noise": False}], ids=str
)
def test_findings_are_a_small_table(options):
    analysis = synthetic_analysis(**options)
    shown = notebook.analysis_html(analysis)
    assert findings.headline(analysis) in shown
    assert len(shown) < 8000
    check_html(shown)


def test_a_closure_that_fails_is_said_first_with_its_causes():
    closure = ntkscope.Closure(0.5, 0.1, 4.0, 0.1, 0.1, None, 0.0, False, ("Too few snapshots: record more.",))
    shown = closure._repr_html_()
    assert "Not as they stand" in shown
    assert "Too few snapshots" in shown.partition("<thead>")[0]
    assert repr(closure) == "Closure(trustworthy=False, energy_error=400 %, gradient_error=10.0 %, query_error=None, ...)"


def some_examples(count=12, **changes):
    values = torch.arange(count, dtype=torch.float64)
    scores = dict.fromkeys(
        ("reservoir_energy", "reservoir_share", "loss", "margin", "area_under_margin", "self_influence", "half_time", "quarter_time",
         "residual_left"), values,
    )  # fmt: skip
    plain = {"ids": list(range(count)), "labels": [3] * count, "true_labels": None, "is_noise": None}
    return Examples(**(plain | scores | changes))


def test_the_most_suspicious_examples_come_first_with_pictures():
    pictures = torch.zeros(12, 8, 8, 1, dtype=torch.uint8)
    parsed = check_html(some_examples(pictures=pictures)._repr_html_())
    names = [attributes["alt"] for tag, attributes in parsed.tags if tag == "img"]
    assert names == [f"input of example {i}" for i in range(11, 1, -1)]
    assert not [tag for tag, _ in check_html(some_examples()._repr_html_()).tags if tag == "img"]


def test_large_pictures_stay_small():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (12, 224, 160, 3), generator=generator, dtype=torch.uint8)
    check_html(some_examples(pictures=pictures)._repr_html_())
    bright = picture_uri(torch.full((224, 160, 3), 255, dtype=torch.uint8))
    assert picture_uri(torch.full((32, 23, 3), 255, dtype=torch.uint8)) == bright, "averaging must not darken edges"


def test_a_table_that_abstains_says_why():
    shown = some_examples(abstains="the energy error is 400 %")._repr_html_()
    assert "no ranking by the reservoir: the energy error is 400 %" in shown
    assert "largest loss" in shown


def test_an_audit_shows_its_figures_beside_chance(results):
    text = " ".join(check_html(results["GateAudit"]._repr_html_()).text)
    assert results["GateAudit"].verdict.sentence in text
    for name, meaning in FIGURES.items():
        assert name in text
        assert meaning in text


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([0.0, 2.0]), "float32, 2, from 0.00 to 2.00"),
        (torch.tensor([[0.0, math.nan], [math.inf, 1.0]]).double(), "float64, 2 × 2, from 0.00 to 1.00, 2 not finite"),
        (torch.full((3,), math.nan), "float32, 3, 3 not finite"),
        (torch.tensor([True, False]), "bool, 2, 1 true"),
        (torch.tensor([4, 1000]), "int64, 2, from 4 to 1,000"),
        (torch.zeros(0, 3), "float32, 0 × 3, empty"),
        (torch.tensor(1.0), "float32, scalar, from 1.00 to 1.00"),
        (torch.zeros(2, dtype=torch.complex64), "complex64, 2"),
        (torch.zeros(2, device="meta"), "float32, 2"),
        (torch.ones(2, requires_grad=True), "float32, 2, from 1.00 to 1.00"),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "bfloat16, 2, from 1.00 to 2.00"),
    ],
    ids=str,
)
def test_tensors_in_words(tensor, words):
    assert brief.tensor_words(tensor) == words


@given(st.lists(st.floats(width=32) | st.just(math.nan), max_size=200), st.sampled_from([sparkline.sparkline, sparkline.histogram]))
def test_pictures_of_vectors_stay_in_their_box(values, draw):
    shown = draw(torch.tensor(values, dtype=torch.float64), "x")
    check_html(shown)
    if draw is sparkline.sparkline and shown:
        pairs = shown.partition('d="')[2].partition('"')[0].replace("M", "L").split("L")[1:]
        for pair in pairs:
            x, y = map(float, pair.split(","))
            assert 0 <= x <= sparkline.WIDTH
            assert 0 <= y <= sparkline.HEIGHT


def test_a_sparkline_falls_where_values_fall_and_keeps_peaks():
    falling = sparkline.sparkline(torch.tensor([3.0, 2.0, 1.0]), "x")
    assert 'd="M2.0,2.0L60.0,12.0L118.0,22.0"' in falling
    peak = torch.zeros(1000)
    peak[517] = 1.0
    assert ",2.0L" in sparkline.sparkline(peak, "x")
    assert "log scale" in sparkline.sparkline(torch.logspace(0, -5, 9), "x")
    assert sparkline.sparkline(torch.tensor([1.0, 2.0, math.nan, 1.0, math.nan, 2.0, 2.0]), "x").count("M") == 3


def test_one_line_needs_no_plotting_library():
    code = (
        "import sys, torch, ntkscope; print(ntkscope.ntk_gram(torch.nn.Linear(2, 1), torch.eye(2)));"
        "print(sorted({'plotly', 'rich', 'jinja2', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, loaded = result.stdout.splitlines()
    assert line.startswith("Gram(matrix=float32[2, 2], num_examples=2, num_classes=1, outputs='full'")
    assert loaded == "[]"


def test_looking_at_a_recorder_takes_no_snapshot():
    recorder = record(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), steps=7, schedule=5)
    before = recorder.num_snapshots
    assert (before, recorder.num_steps, recorder.is_attached) == (2, 7, True)
    assert "num_snapshots=2" in repr(recorder)
    recorder._repr_html_()
    assert recorder.num_snapshots == before
    model, inputs, targets = problem()
    fresh = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy")
    assert "recorder.attach(optimizer)" in fresh._repr_html_()


def test_an_optimizer_shows_one_column_a_group(results):
    text = check_html(results["GatedAdamW"]._repr_html_()).text
    assert {"group 0", "group 5"} <= set(text)
    assert "1 step taken" in " ".join(text)


def test_an_unfinished_result_has_a_line():
    assert repr(object.__new__(ntkscope.Closure)) == "Closure()"


def test_long_values_are_cut_and_what_is_left_out_is_counted(results):
    many = copy.copy(results["Coverage"])
    object.__setattr__(many, "routes", {f"layer{k}.weight": "linear" for k in range(500)})
    shown = many._repr_html_()
    check_html(shown)
    assert "more rows are not shown" in shown
    assert brief.cut("x" * 300, 200) == "x" * 197 + "..."
