"""Which version is the champion: the first, and later ones only when the same protocol on the same data says better."""

from typing import NamedTuple


class Verdict(NamedTuple):
    promoted: bool
    reason: str


def champion_verdict(new: dict[str, str], champion: dict[str, str] | None, margin: float) -> Verdict:
    """Compare two versions by their tags `vit.gate_metric`, `vit.gate_value` and `vit.gate_data`.

    `champion` is None where there is none yet. The new version must be better by at least `margin`.
    """
    if champion is None:
        return Verdict(True, "first version")
    for tag, what in (("vit.gate_metric", "another protocol"), ("vit.gate_data", "other data")):
        if not new.get(tag) or not champion.get(tag):
            return Verdict(False, "not compared: a version without an evaluation")
        if new[tag] != champion[tag]:
            return Verdict(False, f"not compared: evaluated by {what} ({new[tag]} against {champion[tag]})")
    ours, theirs = float(new["vit.gate_value"]), float(champion["vit.gate_value"])
    words = f"{new['vit.gate_metric']} {ours:.4f} against the champion's {theirs:.4f}"
    gain = ours - theirs
    if gain >= margin:
        return Verdict(True, f"better by {gain:.4f}, margin {margin}: {words}")
    return Verdict(False, f"gain {gain:.4f} is below the margin {margin}: {words}")
