"""How the images were made that timm's weights of a name were learned from: `python -m models.pretrained_facts NAME`.

Prints JSON, for those who must not load torch; {} where timm has no such name. Nothing is downloaded.
"""

import json
import sys
from typing import Any

from timm.models import get_pretrained_cfg


def pretrained_facts(name: str) -> dict[str, Any]:
    """mean, std, crop_pct, crop_mode, input_size and num_classes of a network by timm's name, with a tag of weights or
    the default one's."""
    config = get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.mean:
        return {}
    return {
        "mean": list(config.mean), "std": list(config.std), "crop_pct": config.crop_pct, "crop_mode": config.crop_mode,
        "input_size": list(config.input_size), "num_classes": config.num_classes,
    }  # fmt: skip


if __name__ == "__main__":
    try:
        facts = pretrained_facts(sys.argv[1])
    except RuntimeError as error:  # of a tag that it does not have
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(facts) + "\n")
