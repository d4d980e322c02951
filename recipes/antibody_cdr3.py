"""AntiBERTy, a pretrained masked LM of antibodies, learns to write CDR-H3 loops of a wanted charge and hydropathy.

Infilling: germline framework, gap, germline framework; the loop between Cys 104 and Trp 118 (IMGT) is written in two
parallel unmasking steps. The reward is a property of the loop's sequence; a KL term and LoRA keep the loops near those
of the pretrained model. Weights: recipes/weights.py (MIT). Results: recipes/results.md; naturalness and diversity of a
run's loops: recipes/antibody_loops.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dllm_rl import Float8WeightOnly, Lora, MaxProb, Policy, Recipe, Trajectory, Unmask, load_policy, main
from dllm_rl.groups import Log
from dllm_rl.tasks import Problem, Reward
from recipes import weights

# Human germline V genes up to Cys 104 and J genes from Trp 118 on, under their IMGT names (no source recorded).
V_GENES = {
    "IGHV1-69*01": "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYC",
    "IGHV3-23*01": "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC",
    "IGHV4-34*01": "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYC",
    "IGHV4-59*01": "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYC",
    "IGHV1-2*02": "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYC",
    "IGHV5-51*01": "EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMGIIYPGDSDTRYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYC",
}
J_GENES = {"IGHJ3*01": "WGQGTMVTVSS", "IGHJ4*01": "WGQGTLVTVSS", "IGHJ6*01": "WGQGTTVTVSS"}
TRAINED = (
    ("IGHV1-69*01", "IGHJ4*01"),
    ("IGHV3-23*01", "IGHJ4*01"),
    ("IGHV4-34*01", "IGHJ6*01"),
    ("IGHV4-59*01", "IGHJ3*01"),
)
HELD_OUT = (("IGHV1-2*02", "IGHJ4*01"), ("IGHV5-51*01", "IGHJ4*01"))

# Kyte and Doolittle, J. Mol. Biol. 157 (1982) 105, table 2.
HYDROPATHY = {
    **{"A": 1.8, "R": -4.5, "N": -3.5, "D": -3.5, "C": 2.5, "Q": -3.5, "E": -3.5, "G": -0.4, "H": -3.2, "I": 4.5},
    **{"L": 3.8, "K": -3.9, "M": 1.9, "F": 2.8, "P": -1.6, "S": -0.8, "T": -0.7, "W": -0.9, "Y": -1.3, "V": 4.2},
}
CHARGE = {"K": 1.0, "R": 1.0, "D": -1.0, "E": -1.0}  # at pH 7, histidine neutral


def charge(loop: str) -> float:
    """Net charge, elementary charges."""
    return sum(CHARGE.get(residue, 0.0) for residue in loop)


def hydropathy(loop: str) -> float:
    """Mean Kyte-Doolittle hydropathy of the residues."""
    return sum(HYDROPATHY[residue] for residue in loop) / len(loop)


# Deamidation, isomerisation: the motifs that Lu et al., mAbs 11 (2019) 45, find most often at fault in CDRs.
LIABILITIES = ("NG", "NS", "DG", "DS")


def liabilities(loop: str) -> float:
    """Motifs at which a residue degrades, N-glycosylation sites (N, no P, S or T), and a cysteine without a partner."""
    sites = sum(a == "N" and b != "P" and c in "ST" for a, b, c in zip(loop, loop[1:], loop[2:], strict=False))
    return float(sum(loop.count(motif) for motif in LIABILITIES) + sites + loop.count("C") % 2)


@dataclass(frozen=True)
class Loops:
    """Loops to be written into germline frameworks.

    frameworks   pairs of a V and a J gene
    size         number of problems: each framework with each length, and again from the beginning
    lengths      of loops, residues
    charges, hydropathies  the wanted windows, ends included

    Reward: a quarter each for charge and hydropathy in their windows, falling to 0 at two charges or one unit outside;
    a half where both are and there is no liability (`solve_rate`); less a quarter for each liability. A loop of
    anything but the 20 residues is graded 0 and not parsed.
    """

    name, version = "cdr-h3", "1"
    frameworks: tuple[tuple[str, str], ...]
    size: int
    lengths: tuple[int, ...] = (10, 11, 12, 13, 14)
    charges: tuple[float, float] = (1, 2)
    hydropathies: tuple[float, float] = (-1.5, -0.5)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        length, place = divmod(index, len(self.frameworks))
        v, j = self.frameworks[place]
        before, gap, after = V_GENES[v], "_" * self.lengths[length % len(self.lengths)], J_GENES[j]
        message = {"role": "user", "content": before + gap + after}  # AntiBERTy's template adds [CLS] and [SEP]
        return Problem([message], {"before": len(before), "after": len(after)}, blank="_")

    def reward(self, problem: Problem, completion: str) -> Reward:
        loop = loop_of(problem, completion)
        if not loop or not set(loop) <= HYDROPATHY.keys():
            return Reward(0.0, False, dict.fromkeys(("charge", "hydropathy", "liabilities", "solve_rate"), 0.0))
        found = {"charge": charge(loop), "hydropathy": hydropathy(loop), "liabilities": liabilities(loop)}
        far = outside(found["charge"], self.charges), outside(found["hydropathy"], self.hydropathies)
        solved = far == (0, 0) and not found["liabilities"]
        value = (max(0.0, 1 - far[0] / 2) + max(0.0, 1 - far[1]) - found["liabilities"]) / 4 + solved / 2
        return Reward(value, True, found | {"solve_rate": float(solved)})


def loop_of(problem: Problem, completion: str) -> str:
    """The loop of a filled-in sequence."""
    fields: Mapping[str, int] = problem.fields
    return completion[fields["before"] : len(completion) - fields["after"]]


def outside(value: float, window: tuple[float, float]) -> float:
    """How far a number lies outside a window."""
    return max(window[0] - value, value - window[1], 0)


def antiberty() -> Policy:
    """The pretrained model, downloaded at the first call."""
    return load_policy(weights.antiberty())


SPECIALS = (0, 1, 2, 3)  # [PAD], [UNK], [CLS] and [SEP] are no residues
in_two = Unmask(max_new_tokens=0, diffusion_steps=2, rank=MaxProb(), temperature=1.0, suppress=SPECIALS)
recipe = Recipe(
    name="antibody-cdr3",
    model=antiberty,
    task=Loops(TRAINED, size=20),
    validation_task=Loops(TRAINED, size=40),
    eval_task=Loops(HELD_OUT, size=60),
    sampler=in_two,
    eval_sampler=in_two,
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(dequantized=True),
    lora=Lora(),
    beta=0.05,
    learning_rate=1.5e-3,
    train_batch_size=4,
    num_steps=24,
    max_retained_graphs=2,
    log=Log(steps=5, completions_steps=10),
)

if __name__ == "__main__":
    main(recipe)
