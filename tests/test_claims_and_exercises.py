"""Claims say what they must; exercises judge answers and never stop a notebook."""

import pytest
import torch

from seqarch.claims import CLAIM_MIME, claim, recorded
from seqarch.exercises import exercise

ROW = dict(paper="12 %", measured="11 %", where="Table 1")


def test_claim_bundle_holds_the_row_and_two_readable_forms():
    bundle = claim("It helps.", holds=torch.tensor(3.0) > 2, value={"gap": 0.1}, **ROW)._repr_mimebundle_()
    assert bundle[CLAIM_MIME]["holds"] is True and bundle[CLAIM_MIME]["value"] == {"gap": 0.1}
    assert "holds here" in bundle["text/plain"] and "Table 1" in bundle["text/html"]


def test_claims_that_fail_or_cannot_be_tested_say_so():
    assert claim("It helps.", holds=False, **ROW).verdict == "not reproduced at this scale"
    assert claim("It helps.", holds=None, **ROW).verdict == "not tested at this scale"


def test_claim_text_is_escaped():
    assert "<script>" not in claim("<script>", holds=True, **ROW).html()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(statement=" "), "expected statement to say something"),
        (dict(holds="yes"), "expected holds to be True, False or None, got 'yes'"),
        (dict(holds=torch.tensor([True])), "expected holds"),
        (dict(value=float("nan")), "expected finite numbers in value"),
    ],
)
def test_claim_errors(change, message):
    arguments = {"statement": "It helps.", "holds": True, **ROW, **change}
    with pytest.raises(ValueError, match=message):
        claim(arguments.pop("statement"), **arguments)


def test_recorded_runs(tmp_path):
    missing = recorded("01-x", folder=tmp_path)
    assert not missing and "make record CHAPTER=01" in missing._repr_markdown_()
    (tmp_path / "01-x.json").write_text('{"chapter": "01-x"}')
    with pytest.raises(ValueError, match="to hold 'device', got the keys"):
        recorded("01-x", folder=tmp_path)


@exercise("Double")
def check_double(answer):
    x = torch.rand(3)
    assert torch.equal(answer(x), 2 * x), "each value must be doubled"


@pytest.mark.parametrize(
    "answer, verdict",
    [
        (lambda x: 2 * x, "correct"),
        (lambda x: x, "not yet: each value must be doubled"),
        (lambda x: x.nothing, "not yet: it raised AttributeError"),
    ],
)
def test_verdicts(answer, verdict, capsys):
    check_double(answer)
    assert f"Double: {verdict}" in capsys.readouterr().out


def test_untouched_answers_are_not_judged(capsys):
    def bare(x): ...

    def documented(x):
        """Double x."""
        ...

    def unfinished(x):
        raise NotImplementedError

    for answer in (bare, documented, unfinished):
        check_double(answer)
        assert capsys.readouterr().out == "Double: not attempted yet\n"
    with pytest.raises(AssertionError, match="got an empty function"):
        check_double.verify(bare)


def test_an_answer_that_returns_its_input_is_judged(capsys):
    def identity(x):
        return x

    check_double(identity)
    assert "not yet" in capsys.readouterr().out


def test_verify_raises_on_a_wrong_solution():
    with pytest.raises(AssertionError, match="doubled"):
        check_double.verify(lambda x: x)


def test_checks_do_not_disturb_the_notebooks_random_numbers():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    check_double(lambda x: 2 * x)
    assert torch.equal(torch.rand(1), want)
