"""Any image model of timm, built from a TimmEncoderConfig, and what timm says of its parameters."""

import difflib
import re

import timm
from timm.layers import DropPath
from torch import nn

from models.encoders.timm_config import TimmEncoderConfig

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def build_timm_network(config: TimmEncoderConfig, num_classes: int) -> nn.Module:
    """A freshly initialised network with heads of `num_classes`, which begin at zero where they are linear.

    ValueError for a name that timm does not have, for arguments that its function does not take, and for a drop path
    that the network does not have.
    """
    if not timm.is_model(config.architecture):
        near = difflib.get_close_matches(config.architecture, timm.list_models(), 3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"name `{config.name}`: timm has no such network{hint}")
    network = _created(config, num_classes)
    if config.drop_path_rate and not any(isinstance(module, DropPath) for module in network.modules()):
        raise ValueError(f"drop_path_rate {config.drop_path_rate:g}: {config.name} has no drop path; set 0")
    for head in linear_heads(network):
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return network


def linear_heads(network: nn.Module) -> list[nn.Linear]:
    """The linear layers that say the classes: one, of a distilled network two, none where no class is known."""
    found = network.get_classifier()
    parts = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    inside = [module for part in parts for module in getattr(part, "linear", part).modules()]  # of a probe, the last
    return [one for one in inside if isinstance(one, nn.Linear) and one.out_features == network.num_classes]


def _created(config: TimmEncoderConfig, num_classes: int) -> nn.Module:
    """Networks of convolutions take no size of an image, and some no drop path: these are left out then."""
    offered = {"img_size": config.image_size, "drop_path_rate": config.drop_path_rate}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.arguments.items()}
    while True:
        try:
            return timm.create_model(
                config.architecture, num_classes=num_classes, in_chans=config.channels, **(offered | given)
            )
        except TypeError as error:
            refused = _UNEXPECTED.search(str(error))
            if refused is None or refused[1] not in offered or refused[1] in given:
                raise ValueError(f"arguments {config.arguments}: {config.name} does not take them: {error}") from error
            del offered[refused[1]]
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{config.name} of {config.image_size} pixels, arguments {config.arguments}: {error}"
            ) from error


def layers_of(network: nn.Module) -> dict[str, int]:
    """The layer of each parameter, 0 for the stem, as timm groups the network for a learning rate per layer."""
    from timm.models import group_parameters

    matcher = network.group_matcher(coarse=False)
    return group_parameters(network, matcher, reverse=True)


def head_names(network: nn.Module) -> set[str]:
    """Names of the classifier's tensors."""
    places = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    places = (places,) if isinstance(places, str) else tuple(places)
    return {name for name in network.state_dict() if name.startswith(tuple(f"{place}." for place in places))}
