"""Pages of docs/ whose numbers belong to no other module here."""

from held import DOCS, runs_of, span_of, stored
from recipes.studies import order, paired, revise
from recipes.studies import schemes as study_of_schemes

MISMATCH, METHOD = "recipes/studies/mismatch.md", f"{DOCS}/method.md"


def schemes():
    """Where the mismatch comes from: recipes/studies/schemes.py."""
    found = stored("schemes")
    yield MISMATCH, study_of_schemes.told(found["rows"])
    for each in found["rows"]:
        name = study_of_schemes.SCHEMES[each["scheme"]].__name__
        nats, ess = f"{each['mean_abs']:.4f}", f"{each['ess']:.4f}"
        yield METHOD, f"- `{name}`: {nats}, {each['k3']:.4f}, {ess}"
        assert each["largest other cause"] < 1e-7
    steps, solved, tokens = found["RL steps"], f"{found['solved']:.3f}", f"{found['rows'][0]['tokens']:,}"
    yield MISMATCH, f"after {steps} RL steps (seed {found['seed']}, {solved} solved; {tokens} tokens"


def spans_of_no_difference():
    """The ends of intervals, which sentences give instead of the interval."""
    edits, orders = runs_of("revise"), "recipes/studies/order.md"
    revised = revise.study.contrasts

    def apart(results, claims):
        return [paired.paired(results, claim.arm, claim.against) for claim in claims]

    gains = apart(edits, [claim for claim in revised if claim.claim.startswith(("edits gain", "training with"))])
    assert len(gains) == 4
    told = span_of(*gains)
    yield "recipes/studies/revise.md", f"that edits make** ({told} at 2, 4 and 8 forwards, and after training with"
    starts = [run["before"] for run in edits.values()]
    yield "recipes/studies/revise.md", f"solves {min(starts):.2f} to {max(starts):.2f} of the puzzles."
    part, noisy = [], []
    for task, study in order.STUDIES.items():
        results = runs_of(f"order_{task}")
        part += apart(results, [claim for claim in study.contrasts if "part helps" in claim.claim])
        noisy += apart(results, [claim for claim in study.contrasts if "than a random one" in claim.claim])
    assert (len(part), len(noisy)) == (4, 2)
    yield orders, f"order's part of the gradient makes** ({span_of(*part)} on both tasks)"
    yield orders, f"({span_of(noisy[0])} on Sudoku, {span_of(noisy[1])} on Countdown)"


def rules_that_decide_how_many():
    page = "recipes/studies/gradients.md"
    yield page, paired.markdown(stored("commits"))
    yield page, "it misses 0.05 to 0.41."
