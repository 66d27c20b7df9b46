"""What claims, verdicts and figures mean, in plain words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What a newcomer has to know of a claim.

    Attributes:
        name: what it is called here.
        asked: the question that was put to the records.
        holds: what HOLDS says.
        violated: what VIOLATED says.
        slack: what the column slack means here.
    """

    name: str
    asked: str
    holds: str
    violated: str
    slack: str


@dataclass(frozen=True)
class Meaning:
    """A status: a sign for it, so that colour is not all there is, and what it says."""

    sign: str
    text: str


STATUSES = {
    "VIOLATED": Meaning(
        "✗",
        "The records contradict the claim, beyond what chance would do. For this network the "
        "theorem is no guide.",
    ),
    "INCONCLUSIVE": Meaning(
        "?",
        "The records cannot decide: too few, too noisy, or not taken. The advice says what would.",
    ),
    "ASSUMPTION_UNMET": Meaning(
        "–",
        "The theorem does not speak about this case, because something that it takes for granted "
        "is missing. The advice says what. It counts neither for the claim nor against it.",
    ),
    "HOLDS": Meaning(
        "✓",
        "The records agree with the claim, and they could have contradicted it. How much that is "
        "worth, slack tells.",
    ),
}
"""Statuses, those first that need attention most."""

_AGREES = "Predicted over measured: 1 is exact agreement."
_NO_SLACK = "None: the theorem says how something grows, and gives no number to set beside it."
_LOOSE = "Bound over measured at the typical point: 1 is tight; 1000 is true and says little."

_BY_CLAIM = {
    "mean ‖x_t‖²": Explanation(
        "Size of the inputs",
        "Do the noised inputs x_t have the size that the data and the noise schedule imply? All "
        "other claims build on it.",
        "The inputs are what the theorems assume.",
        "The data or the noise schedule is not what the run says; look at the data loading first.",
        _AGREES,
    ),
    "explicit law of E‖h_i‖²": Explanation(
        "Formula for feature sizes, random networks",
        "In random, untrained networks, is every feature h_i as large on average as the formula "
        "says? All constants are known there, so nothing is fitted.",
        "The formula for feature sizes is right where its assumptions are met.",
        "An assumption of the formula is broken in these networks.",
        _AGREES,
    ),
    "explicit law of E‖∇_W ℓ_s‖²": Explanation(
        "Formula for gradient sizes, random networks",
        "In random, untrained networks, are the gradients of every block as large on average as "
        "the formula says?",
        "The formula for gradient sizes is right where its assumptions are met.",
        "An assumption of the formula is broken in these networks.",
        _AGREES,
    ),
    "‖h_i‖² in the band": Explanation(
        "Feature sizes stay in their band",
        "Does the size of every feature h_i stay in the band that the input and the skip "
        "coefficients set? The band is fitted on half of the samples and tested on the others.",
        "Feature sizes are explained by the skips: scaling the skips will move them.",
        "At some level, features are larger or smaller than the skips explain.",
        "The upper edge of the band over the energy that was measured, at the typical point.",
    ),
    "same weights, all κ times s": Explanation(
        "Features follow the skips",
        "If all skips of this very network are turned down together, do feature energies fall "
        "along a straight line, as the theorem says?",
        "The skips drive the feature energies of this network; scaling them will work as the "
        "theorem says.",
        "At some level, features do not follow the skips along a line: the blocks bend it.",
        "What a line through the smaller settings predicts, over what was measured: 1 is a line.",
    ),
    "range of ‖h_i‖²": Explanation(
        "Stronger skips, larger swings",
        "Over all these runs, do features swing more during training where skips are stronger "
        "(larger Σκ²)?",
        "Stronger skips go with larger swings, as the theorem says: scaling down should help.",
        "Stronger skips go with smaller swings here: training outweighs what skips do at the "
        "start.",
        _NO_SLACK,
    ),
    "order: ‖∇W ℓ_s‖²": Explanation(
        "Growth of the gradients",
        "Do gradients grow no faster than loss × input size × skip strength, from sample to "
        "sample and from level to level?",
        "Gradients grow as the theorem says, or more slowly.",
        "Gradients grow faster than the theorem says over the range that was seen.",
        _NO_SLACK,
    ),
    "‖∇W ℓ_s‖² ≤ c": Explanation(
        "Bound on the gradients",
        "Does a bound on gradients that is set on easy samples also cover the hard ones?",
        "Gradients of hard samples stay below the bound.",
        "Hard samples have larger gradients than the bound allows, in some block.",
        _LOOSE,
    ),
    "‖Δout‖/ε ≤ σ_max(J)": Explanation(
        "Reaction to the input",
        "If the input is changed a little, can the output change by more than the theorem allows? "
        "Measured ≤ worst case σ_max(J) ≤ bound must be true at each single point.",
        "At every probed point the output changes by no more than the bound. Look at slack: "
        "multiplied over many blocks, the bound is often thousands of times too large.",
        "At some point a quantity is above its bound: either the network is not of the form that "
        "the theorem takes, or a measurement is wrong.",
        _LOOSE,
    ),
    "failures of the band": Explanation(
        "Failures become rare with width",
        "Do random networks outside the band become exponentially rarer with their width?",
        "A wider network is exponentially surer to stay in the band.",
        "Width buys less than the theorem says.",
        _NO_SLACK,
    ),
    "the constant c of exp(−c mρ²)": Explanation(
        "Failures become rare at one rate",
        "Is the rate at which they become rare the same for every number of skips?",
        "It is.",
        "It falls with the number of skips: deeper networks need more width.",
        _NO_SLACK,
    ),
}  # fmt: skip
"""By how the claim begins."""


def explain(claim: str) -> Explanation | None:
    """What a claim means; `None` if it is not known here.

    >>> explain("‖∇W ℓ_s‖² ≤ c ℓ_s‖x_t‖²(Σκ² + 1)").asked
    'Does a bound on gradients that is set on easy samples also cover the hard ones?'
    """
    known = (text for start, text in _BY_CLAIM.items() if claim.startswith(start))
    return next(known, None)


@dataclass(frozen=True)
class Caption:
    """What a figure is called, and what to look for in it."""

    title: str
    text: str


CAPTIONS = {
    "features": Caption(
        "Size of the features during training",
        "One column a scaling scheme, one row a place in the network. Blue is measured; the orange "
        "area is the band of Theorem 3.1, fitted where it was measured. Look for blue outside of "
        "orange, for swings, and for growth that does not end.",
    ),
    "oscillation": Caption(
        "Do stronger skips make features swing more?",
        "Each point is a run: to the right the skips are stronger, higher up the features swing "
        "more. The theorem says that points rise along the orange line.",
    ),
    "coefficients": Caption(
        "What every skip is multiplied by",
        "κ of every skip, the outermost first, as it was measured. Learned ones move during "
        "training; look whether they fall with depth.",
    ),
    "gradients": Caption(
        "Gradients of single samples, block by block",
        "Blue is measured, orange the bound of Theorem 3.3, calibrated on the easier samples. Look "
        "for blocks in which blue comes up to orange.",
    ),
    "sensitivity": Caption(
        "How strongly the output reacts to the input",
        "From below: what random changes reach, the exact worst case σ_max(J), and its bounds. The "
        "order must be kept at each point. The distance from the worst case to the uppermost line "
        "is the slack of Theorem 3.4, on a logarithmic axis.",
    ),
    "loss": Caption(
        "Training loss",
        "Thick lines are running means. Look for jumps and for runs that stop falling.",
    ),
    "law": Caption(
        "Random networks: formula and measurement",
        "Each point is a level under one scheme. Points on the line are what the formula says; "
        "vertical lines are what chance leaves open.",
    ),
    "energies": Caption(
        "Size of the features, level by level",
        "One panel a noise level. Blue is measured, the orange area the band of Theorem 3.1, "
        "fitted. Look for levels at which blue leaves orange.",
    ),
    "hierarchy": Caption(
        "How strongly the output reacts to the input",
        "From below: what random changes reach, the exact worst case σ_max(J), and its bounds, "
        "each one coarser than the last. Look how far the bound that you rely on is above the "
        "worst case; the axis is logarithmic.",
    ),
    "paths": Caption(
        "Which skip carries the sensitivity",
        "The norm of the way through each skip alone. The highest bar is the skip whose scaling "
        "changes most.",
    ),
    "blame": Caption(
        "What each skip and the middle carry",
        "Shares of the bound, of the worst case that really occurs, and of the energy that the "
        "merge reads. A skip that is high in all three is the first to scale.",
    ),
    "counterfactual": Caption(
        "The same network with its skips turned down",
        "Each colour is a level. The theorem says that points lie on a rising line; where they "
        "bend away from it, the blocks do something else with what skips bring.",
    ),
}
"""By the name of the figure."""
