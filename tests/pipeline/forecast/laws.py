"""Known laws that made-up ladders follow: none of them is the model that is fitted to them, except by chance."""

RUNGS = [(images, parameters) for parameters in (5.5e6, 2.2e7) for images in (1e5, 2e5, 4e5)]
FULL = (1e6, 8.6e7)
CHANCE = 0.9


def known_law(images, parameters, *, floor, exponent, of_parameters, first):
    """`first` is the error above the floor of the smallest rung."""
    return floor + first * (images / 1e5) ** -exponent * (parameters / 5.5e6) ** -of_parameters


def sigmoid(images, parameters, *, middle, steepness):
    """An error that levels off at chance: half way down at so many images of the larger size."""
    reach = (images / middle) * (parameters / 2.2e7) ** 0.3
    return 0.05 + (CHANCE - 0.05) / (1 + reach**steepness)


def drawn_law(random):
    """Arguments of a `known_law`."""
    return {
        "floor": random.uniform(0, 0.15), "exponent": abs(random.normal(0.3, 0.15)),
        "of_parameters": abs(random.normal(0.1, 0.08)), "first": random.uniform(0.2, 0.7),
    }  # fmt: skip
