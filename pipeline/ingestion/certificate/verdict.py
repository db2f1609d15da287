"""What the facts amount to: findings, to be looked at before training, and notes, which are good to know."""

from typing import Any

Facts = dict[str, Any]
TOLD_SHARE = 0.01  # of images without a label, or not taken: above it is a finding, below a note


def verdict(facts: Facts) -> Facts:
    """`sound` where there are no findings; `words` in one line."""
    findings = [*_copy_findings(facts["copies"] or {}), *_class_findings(facts), *_unlabelled_findings(facts)]
    findings += facts["layout"]["findings"]
    lost, lost_share = _lost(facts)
    findings += lost if lost_share > TOLD_SHARE else []
    if facts["copies"] is None:
        findings.append("pixels were not looked at, so neither leaks nor copies would have been found")
    notes = [*_copy_notes(facts["copies"] or {}), *_label_notes(facts), *facts["_notes"], *facts["layout"]["notes"]]
    notes += [*_split_notes(facts["splits"]), *(lost if lost_share <= TOLD_SHARE else [])]
    words = "sound, nothing found that speaks against training on it"
    if small := (facts["copies"] or {}).get("too_small_for_near"):
        words = f"sound as far as it was examined: near copies of {number(small, 'image')} were not looked for"
    if findings:
        words = f"{len(findings)} finding{'s' * (len(findings) > 1)}: {'; '.join(findings)}"
    return {"sound": not findings, "words": words, "findings": findings, "notes": notes}


def _copy_findings(copies: Facts) -> list[str]:
    findings = []
    for leak in copies.get("leaks", ()):
        known = f"{leak['images_there']:,} of the {leak['of_images_there']:,} images there"
        kinds = [f"{leak[kind]:,} {word}" for kind, word in (("exact", "with equal pixels"), ("near", "near copies"))
                 if leak[kind]]  # fmt: skip
        findings.append(
            f"{number(leak['images'], 'image')} of {leak['from']} leak{'s' * (leak['images'] == 1)} to {leak['to']} "
            f"({', '.join(kinds)}; {known} are not new to the model)"
        )
    if (said := copies.get("contradictory_labels", {})).get("groups"):
        groups = number(said["groups"], "group")
        findings.append(f"{number(said['images'], 'image')} in {groups} of equal pixels have different labels")
    if count := copies.get("suspicious_labels"):
        findings.append(f"{number(count, 'pair')} of near copies with different labels")
    return findings


def _class_findings(facts: Facts) -> list[str]:
    classes, splits = facts["classes"] or [], facts["splits"]
    if "train" not in splits:
        return []
    untrained = [one["name"] for one in classes if not one["train"] and any(one[split] for split in splits)]
    if not untrained:
        return []
    names = ", ".join(untrained[:5]) + (", ..." if len(untrained) > 5 else "")
    plural = "es have" if len(untrained) > 1 else " has"
    return [f"{len(untrained)} class{plural} images to be judged on and none to train on ({names})"]


def _copy_notes(copies: Facts) -> list[str]:
    notes = []
    if small := copies.get("too_small_for_near"):
        notes.append(
            f"near copies of {number(small, 'image')} were not looked for, which have a side below "
            f"{copies['method']['smallest_side']} pixels: leaks of nearly equal images would not have been found"
        )
    if removed := copies.get("removed", {}).get("images"):
        leaking = copies["removed"]["leaking"]
        notes.append(f"{number(removed, 'copy', 'copies')} left out of the dataset, {leaking:,} of them for leaking")
    for kind, words in (("exact_copies", "the pixels of an earlier one"), ("near_copies", "a near copy inside it")):
        for split, count in copies.get(kind, {}).items():
            notes.append(f"{number(count, 'image')} of {split} {'has' if count == 1 else 'have'} {words}")
    return notes


def _lost(facts: Facts) -> tuple[list[str], float]:
    """What could not be taken, in words, and its share of the images."""
    lost = {reason: said["count"] for reason, said in facts["rejected"].items() if said["lost_image"]}
    if not lost:
        return [], 0.0
    count = sum(lost.values())
    total = count + sum(said["images"] for said in facts["splits"].values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    return [f"{count:,} of {number(total, 'image')} could not be taken ({reasons})"], count / total


def _unlabelled_findings(facts: Facts) -> list[str]:
    """Of splits that are labelled in part: one without any label was meant so."""
    return [
        f"{said['unlabelled']:,} of the {said['images']:,} images of {split} have no label"
        for split, said in facts["splits"].items()
        if said["unlabelled"] < said["images"] and said["unlabelled"] > TOLD_SHARE * said["images"]
    ]


def _split_notes(splits: Facts) -> list[str]:
    return [] if splits.keys() != {"train"} else ["no validation and no test split: nothing to judge a model on"]


def _label_notes(facts: Facts) -> list[str]:
    unlabelled = sum(said["unlabelled"] for said in facts["splits"].values())
    total = sum(said["images"] for said in facts["splits"].values())
    notes = []
    if unlabelled:
        notes.append("no image has a label" if unlabelled == total else f"{unlabelled:,} of {total:,} have no label")
    sizes = [count for one in facts["classes"] or [] if (count := one.get("train"))]
    if sizes and max(sizes) >= 10 * min(sizes):
        notes.append(f"classes are uneven: {min(sizes):,} to {max(sizes):,} images to train on")
    return notes


def number(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"
