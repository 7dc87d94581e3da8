"""Refuse YAML whose aliases stand for more values than any config has, before they are expanded."""

import math

import yaml

MAX_VALUES = 100_000  # of a document, counting an alias as all that it stands for


def check_aliases(text: str) -> None:
    """Raise ValueError if a YAML document has more than MAX_VALUES values, or one that contains itself."""
    if "*" not in text:
        return
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # an alias is its anchor's node once more
    if root is not None and _count_values(root, {}) > MAX_VALUES:
        raise ValueError(f"its aliases (*NAME) stand for more than {MAX_VALUES:,} values")


def _count_values(node: yaml.Node, counts: dict[yaml.Node, float]) -> float:
    """Return the number of values below a node, itself included; each node is visited once."""
    if node not in counts:
        counts[node] = math.inf  # until it is known: of a node that contains itself
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        counts[node] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[node]
