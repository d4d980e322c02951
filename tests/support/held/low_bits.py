"""The study of four-bit rollouts: its table and its sentences."""

from held import STUDIES, stored
from recipes.studies.low_bits_gradients import lost_reward, table

PAGE = f"{STUDIES}/low_bits.md"


def low_bits():
    kept = stored("low_bits_gradients")
    text = table(kept)
    yield PAGE, text.strip()
    rows = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ") for line in text.splitlines()[2:]}
    cosine, gain = ({arm: cells[column] for arm, cells in rows.items()} for column in (2, 3))
    for arm in ("int4, tis", "int4, ais"):
        mean, half = map(float, gain[arm].split("±"))
        assert mean > half, "the claim holds"
    mean, half = map(float, gain["int4, permuted ais"].split("±"))
    assert mean <= half, "and does not of the control"
    yield PAGE, f"higher than without a corrector by {gain['int4, tis']} and {gain['int4, ais']}."
    yield PAGE, f"(`permuted ais`) the cosine rises by {gain['int4, permuted ais']}."
    aligned = f"is {cosine['int4, aligned']}, lower than without a corrector ({gain['int4, aligned']})."
    yield PAGE, f"whose cosine with the learner's {aligned}"
    yield PAGE, f"the INT4 copy's completions get {lost_reward(kept)} reward."
    assert max(abs(float(cosine[a].split("±")[0]) - b) for a, b in FIRST.items()) < 0.3


FIRST = {"int4": 0.30, "int4, tis": 1.04, "int4, ais": 1.02, "int4, permuted ais": 0.28, "int4, aligned": -0.04}
