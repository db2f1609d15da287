"""Moving `champion` in a registry that several people write to at once.

MLflow cannot compare and swap an alias. So a version first writes whom it means to replace (tag `vit.gate_claim`), then
looks who else does, and every claimant works out the same winner from the same evidence and sets it, until nobody new
has come. Claims stay, so the last one to set the alias has seen all of them. Claims that were settled before a version
looked at the champion are not its rivals: a person may have moved the alias back since.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.registry.gate import Standing, Verdict, champion_verdict
from pipeline.registry.versions import versions_named

CLAIM, DECISION = "vit.gate_claim", "vit.gate_decision"
NOBODY = "none"
ROUNDS = 20  # a registry where this many others come between is not at rest

Standings = Callable[[str], list[Standing] | str]  # of a version; in words why there are none


class Claim(NamedTuple):
    """Written as `BASE TIME`, with ` settled` behind it when its version has done what it could."""

    time: int  # ns; only orders claims
    version: str
    base: str  # the champion that it means to replace
    settled: bool


@dataclass
class Promotion:
    """One version's way to `champion`; `standings_of` gives the evidence of each version of the name."""

    client: Any
    name: str
    number: str
    standings_of: Standings
    margin: float
    judged: dict[tuple[str, str | None], Verdict] = field(default_factory=dict)

    def decide(self) -> tuple[Verdict, str | None]:
        """The gate's verdict, with the alias moved and the reason written as a tag; and who was champion before.

        `candidate` becomes the version that was asked about last.
        """
        self.client.set_registered_model_alias(self.name, "candidate", self.number)
        verdict, before = Verdict(False, f"not decided: the champion changed {ROUNDS} times meanwhile"), None
        for _ in range(ROUNDS):
            old = {claim.time for claim in self._claims() if claim.settled}
            before = self._champion()
            if before == self.number:
                return Verdict(True, self._tags().get(DECISION, "first version")), before
            verdict = self._against(self.number, before)
            if not verdict.promoted:
                break
            mine = f"{before or NOBODY} {time.time_ns()}"
            self._tag(CLAIM, mine)
            if self._champion() == before:
                verdict = self._settle(before or NOBODY, old, verdict)
                self._tag(CLAIM, f"{mine} settled")
                break
        self._tag(DECISION, verdict.reason)
        return verdict, before

    def _settle(self, base: str, old: set[int], verdict: Verdict) -> Verdict:
        """Set the alias to the best of all who mean to replace `base`; the verdict on this version."""
        seen: list[str] = []
        for _ in range(ROUNDS):
            rivals = [claim.version for claim in sorted(self._claims()) if claim.base == base and claim.time not in old]
            if rivals == seen:
                break
            seen, winner, reason = rivals, rivals[0], verdict.reason
            for other in rivals[1:]:
                judged = self._against(other, winner)
                if self.number in (other, winner):
                    reason = f"version {other}: {judged.reason}" if judged.promoted and winner == self.number else (
                        judged.reason)  # fmt: skip
                winner = other if judged.promoted else winner
            self.client.set_registered_model_alias(self.name, "champion", winner)
            if len(rivals) > 1:
                named = ", ".join(f"version {one}" for one in rivals if one != self.number)
                reason += f"; {named} meant to replace version {base} at the same time, and version {winner} stays"
                verdict = Verdict(winner == self.number, reason)
        return verdict

    def _against(self, number: str, other: str | None) -> Verdict:
        if (number, other) not in self.judged:
            self.judged[number, other] = self._compared(number, other)
        return self.judged[number, other]

    def _compared(self, number: str, other: str | None) -> Verdict:
        if other is None:
            return champion_verdict([], None, self.margin)
        both = [self.standings_of(number), self.standings_of(other)]
        for found in both:
            if isinstance(found, str):
                return Verdict(False, f"not compared: {found}")
        return champion_verdict(*both, self.margin)

    def _champion(self) -> str | None:
        found = self.client.get_registered_model(self.name).aliases.get("champion")
        return None if found is None else str(found)

    def _claims(self) -> list[Claim]:
        claims = []
        for one in versions_named(self.client, self.name):
            if written := one.tags.get(CLAIM):
                base, moment, *settled = written.split()
                claims.append(Claim(int(moment), str(one.version), base, bool(settled)))
        return claims

    def _tags(self) -> dict[str, str]:
        return self.client.get_model_version(self.name, self.number).tags

    def _tag(self, key: str, value: str) -> None:
        self.client.set_model_version_tag(self.name, self.number, key, value)
