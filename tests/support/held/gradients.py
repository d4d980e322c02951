"""The study of gradients: its table, and the numbers of its sentences."""

from held import STUDIES, row, stored, tables_of


def cells(table, rows, *columns):
    """The cells of a table of gradients.json, as numbers: bias, error, efficiency."""
    found = {each["row"]: each for each in stored("gradients")[table]}
    return [tuple(map(float, found[name][column].split("/"))) for name in rows for column in columns]


def gradient_tables():
    page = f"{STUDIES}/gradients.md"
    table, _ = tables_of(page)
    kept = {each["row"]: each for each in stored("gradients")["corrector, n = 128"]}
    for told in table:
        names = [name for name in told if name != "corrector"]
        yield page, row(told["corrector"], *(kept[told["corrector"]][name] for name in names))


def gradient_findings():
    """Of each sentence of the page, from the tables of the JSON."""
    page, found = f"{STUDIES}/gradients.md", stored("gradients")
    many, few = "corrector, n = 128", "corrector, n = 16"
    near = {cell.split("/")[1] for each in found[many] for name, cell in each.items() if name == "early 0.1"}
    yield page, f"At early 0.1 errors are {min(near)} or {max(near)}."
    columns = [name for name in found[many][0] if name != "row"]
    pairs = zip(cells(many, ["AIS, alarm"], *columns), cells(many, ["TIS, tokens, cap 2"], *columns), strict=True)
    largest = max(abs(a - b) for both in pairs for a, b in zip(*both, strict=True))
    yield page, f"AIS's `ais_lambda` is within {largest:.2f} of token TIS."
    (_, ess) = cells("corrector: mean weight/ESS", ["sequence IS, no cap"], "late 0.5")[0]
    assert {each[0] for each in cells(many, ["sequence IS, no cap"], *columns)} == {0.0}
    six = cells(
        "corrector, 6 tokens of 2 words, n = 128",
        ["sequence IS, no cap", "TIS, sequence, cap 2", "TIS, tokens, cap 2"],
        "late 0.5",
    )
    yield page, f"At late 0.5 their ESS is {ess:.2f}."
    free, cut, tokens = (f"{each[1]:.2f}" for each in six)
    yield page, f"Over 6 tokens their error at late 0.5 is {free}, with cap 2 it is {cut}, token TIS's {tokens}."
    three = cells(few, ["none", "TIS, tokens, cap 2", "sequence IS, no cap"], "early 0.5")
    errors = [f"{each[1]:.2f}" for each in three]
    yield page, "Errors at early 0.5: `none` {}, token TIS {}, sequence IS {}.".format(*errors)
    removed = stored("gradients_removed")["AIS by error, weights of sequences, cap 2, 16 rows"]
    removed = {each["of"]: each for each in removed}
    own, best = (removed[f"efficiency, {which}"] for which in ("AIS by error", "best lambda"))
    largest = max(float(own[name]) - float(best[name]) for name in own if name != "of")
    lost = max(float(best[name]) - float(own[name]) for name in own if name != "of")
    yield page, f"its efficiency is higher by {largest:.2f} at most, and lower by up to {lost:.2f}"
    own, best = (removed[f"error, {which}"] for which in ("AIS by error", "best lambda of 0, 0.25, 0.5, 0.75, 1"))
    less = sorted(round(float(best[name]) - float(own[name]), 2) for name in own if name != "of")
    assert [sum(each > 0 for each in less), sum(each < 0 for each in less)] == [4, 1]
    yield page, f"in four of six columns, by {less[-1]:.2f} at most, and higher in one, by {-less[0]:.2f}."
    yield from after_an_update(page)
    yield from of_estimators_and_orders(page)


def after_an_update(page):
    table = "surrogate after an update, n = 128"
    names = ("ppo_clip, .2", "r A, no clip", "dual clip, delta 1.2", "dppo_tv, .2", "cispo, 5", "bgpo, .2 and 3")
    rows = (cells(table, [name], "early 0.5", "late 0.3", "late 0.5") for name in (*names, "sequence_masked, .1"))
    clip, free, dual, tv, cispo, bgpo, masked = rows
    early, late = (f"{clip[at][0]:.2f} against {free[at][0]:.2f}" for at in (0, 1))
    yield page, f"{early} (early 0.5), {late} (late 0.3)."
    yield page, f"lowers {clip[0][0]:.2f} to {dual[0][0]:.2f} and the error from {clip[0][1]:.2f} to {dual[0][1]:.2f}."
    others = [each["row"] for each in stored("gradients")[table]]
    least = [min(each[1] for each in cells(table, others, column)) for column in ("late 0.3", "late 0.5")]
    assert least == [tv[1][1], tv[2][1]]
    yield page, f"`dppo_tv` has the least error at late 0.3 ({least[0]:.2f}) and 0.5 ({least[1]:.2f})."
    assert cispo[0] == free[0]
    yield page, f"At early 0.5 its bias is {tv[0][0]:.2f}; `CISPO`'s is {cispo[0][0]:.2f}, as without a clip."
    yield page, f"`BGPO` is more biased ({bgpo[0][0]:.2f} and {bgpo[2][0]:.2f} at sigma 0.5)"
    yield page, f"`SequenceMasked` at early 0.5 more than `PPOClip` ({masked[0][0]:.2f})."
    assert masked[0][0] > clip[0][0]


def of_estimators_and_orders(page):
    found = stored("gradients")
    cosines = {each["row"]: (each["early cosine"], each["late cosine"]) for each in found["estimator, n = 128"]}
    without = [name for name in cosines if not name.startswith(("trajectory,", "trajectory", "block"))]
    without.append("trajectory, 1 segment")
    span = "{} to {}".format(*(f(cosine for name in without for cosine in cosines[name]) for f in (min, max)))
    yield page, f"have a mean gradient at cosine {span} with the true one (of eight draws"
    (block,) = set(cosines["block of 2, 2 masks"])
    yield page, f"one block a step, it is {block}."
    assert cosines["trajectory"] == ("1.00", "1.00")
    table = "rank confidence, n = 128"
    names = [name for name in found[table][0] if name != "row"]
    moved = [name for name in names if not name.endswith("0.0")]
    early, late = cells(table, ["tokens alone, none"], "early 0.0", "late 0.0")
    assert {each[0] for each in cells(table, ["tokens and order, none"], "early 0.0", "late 0.0")} == {0.0}
    yield page, f"tokens alone have bias {early[0]:.2f} (early) and {late[0]:.2f} (late), tokens and order none."
    weighed = [f"{what}, sequence IS" for what in ("tokens and order", "tokens alone")]
    biases = ([each[0] for each in cells(table, [name], *moved)] for name in weighed)
    spans = [f"{min(each):.2f} to {max(each):.2f}" for each in biases]
    yield page, f"sequence weights of both have bias {spans[0]}, of tokens alone {spans[1]}."
    both, alone = ([f"{each[1]:.2f}" for each in cells(table, [name], "early 0.5", "late 0.5")] for name in weighed)
    yield page, f"the errors of both are {both[0]} and {both[1]}, of tokens alone {alone[0]} and {alone[1]}."
    lines = {each["row"]: each for each in found["12 lines: change/missed/wrong sign"]}

    def at(name, when):
        change, missed, wrong = lines[name][when].split("/")
        return float(change), float(missed), int(wrong)

    (early, missed, wrong), (late, more, worse) = at("max_prob", "early"), at("max_prob", "late")
    yield page, f"{missed:.2f} of a change of {early:.2f} in the expected reward early in training,"
    yield page, f"{more:.2f} of {late:.2f} late, with the wrong sign in {wrong} and {worse} of 12 networks."
    noisy = [name for name in lines if name.startswith("plackett") and "alone" not in name]
    most = {when: [at(name, when) for name in noisy] for when in ("early", "late")}
    assert {wrong for each in most.values() for _, _, wrong in each} == {0}
    told = [f"{max(m for _, m, _ in each):.3f} of at most {max(c for c, _, _ in each):.2f}" for each in most.values()]
    yield page, f"Under `PlackettLuce` it misses {told[0]} and {told[1]}, at temperatures from 0.03 to 1,"
    without = [f"plackett_luce {temperature}, tokens alone" for temperature in ("0.03", "1.0")]
    cold, warm = ([f"{at(name, when)[1]:.2f}" for when in ("early", "late")] for name in without)
    yield page, f"it misses {cold[0]} (early) and {cold[1]} (late) at temperature 0.03,"
    yield page, f"and {warm[0]} and {warm[1]} at temperature 1."
